"""Attention of a training row block by block: only where the visibility rule allows anything.

Passages are blind to each other and to the rest, so each attends to itself; a sample's computed
tokens attend to all of the sample under a mask. That is about a third of the dense product at ten
passages. The query heads of a group are laid beside each other as more queries of one key head.
Knows tensors and transformers' attention interface; registered under `NAME`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvlink_segmented"

# For each sample of the row: the lengths of its runs of tokens, one passage or computed tokens
# between two; for each run the bias of a passage, float [groups * n, n], or None; and the bias of
# all its computed tokens, [groups * m, tokens]. groups: query heads a key head. Plain tuples, which
# every wrapper of a model hands on as they are.
Plan = list[tuple[list[int], list["Tensor | None"], Tensor]]


def segmented_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: Plan | dict[str, Plan],
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over one row.

    query [1, heads, tokens, dim]; key, value [1, kv_heads, tokens, dim]; returns
    [1, tokens, heads, dim].
    """
    if isinstance(plan, dict):
        plan = plan[module.config.layer_types[module.layer_idx]]  # type: ignore[union-attr,index]
    own = [sum(lengths) for lengths, *_ in plan]
    samples = zip(
        *(torch.split(states, own, dim=2) for states in (query, key, value)), plan, strict=True
    )
    seen = [_sample(q, k, v, each, scaling) for q, k, v, each in samples]
    return torch.cat(seen, dim=2).transpose(1, 2), None


def _sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: tuple[list[int], list[Tensor | None], Tensor],
    scale: float,
) -> Tensor:
    """One sample: [1, heads, tokens, dim]. Split and joined, whose gradients cost one copy each."""
    lengths, passages, free = plan
    runs = zip(
        *(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True
    )
    q, k, v = (list(each) for each in zip(*runs, strict=True))
    computed = torch.cat([q[i] for i, bias in enumerate(passages) if bias is None], dim=2)
    stretches = [n for n, bias in zip(lengths, passages, strict=True) if bias is None]
    rest = iter(torch.split(_attend(computed, key, value, free, scale), stretches, dim=2))
    return torch.cat(
        [
            next(rest) if bias is None else _attend(q[i], k[i], v[i], bias, scale)
            for i, bias in enumerate(passages)
        ],
        dim=2,
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Grouped-query attention under one bias: [1, heads, n, dim]."""
    packed = query.reshape(1, key.shape[1], -1, query.shape[3])
    seen = scaled_dot_product_attention(
        packed, key, value, attn_mask=bias.to(query.dtype), scale=scale
    )
    return seen.reshape(query.shape)


def _no_mask(*arguments: Any, **named: Any) -> None:
    return None


AttentionInterface.register(NAME, segmented_attention)
AttentionMaskInterface.register(NAME, _no_mask)
