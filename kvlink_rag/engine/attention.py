"""Grouped-query attention under a mask, without copies of keys and values.

transformers repeats key and value heads for every query head as soon as there is a mask: at 2,000
cached tokens more bytes move than the products need. Here the query heads of a group are laid
beside each other as more queries of one key head, and the mask is repeated once for all layers.
On a CPU in bfloat16 the products are bfloat16 too: torch's fused kernel widens them to float32
there and takes two to three times as long. Knows tensors and transformers' attention interface;
registered under `NAME`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .live_cache import ByRow

NAME = "kvlink_grouped"
SCORE_BYTES = 4 << 20  # of scores at a time, about what a core's cache holds
SAMPLED = 16  # every which key is looked at to guess a row's largest score


def pack_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """bool [queries, keys] to additive [1, 1, groups * queries, keys] in `dtype`."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    additive.masked_fill_(~mask, -torch.inf)
    return additive.repeat(groups, 1)[None, None]


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | ByRow,
    value: Tensor | ByRow,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: [1, queries, heads, head_dim].

    query [1, heads, queries, head_dim]; key, value [1, kv_heads, keys, head_dim]; attention_mask
    from `pack_mask`. Without such a mask, or for a batch, transformers' own function takes over.
    Of several prompts (`ByRow`) each row's attention is its own.
    """
    if isinstance(key, ByRow) and isinstance(value, ByRow):
        outputs = [
            grouped_attention(module, query[i : i + 1], k, v, mask, scaling=scaling, **kwargs)[0]
            for i, (k, v, mask) in enumerate(zip(key.rows, value.rows, key.masks, strict=True))
        ]
        return torch.cat(outputs), None
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if batch == 1 and queries == 1 and attention_mask is None and query.device.type == "cpu":
        return _one_query(query, key, value, scaling), None
    if batch != 1 or attention_mask is None or attention_mask.shape[2] != groups * queries:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    packed = query.reshape(1, kv_heads, groups * queries, head_dim)
    if _narrow(packed):
        scaling = head_dim**-0.5 if scaling is None else scaling
        out = narrow_attention(packed[0], key[0], value[0], attention_mask[0, 0], scaling)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            packed, key, value, attn_mask=attention_mask, scale=scaling
        )
    return out.reshape(1, heads, queries, head_dim).transpose(1, 2).contiguous(), None


def _one_query(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of a generated token that sees all keys: [1, 1, heads, head_dim].

    The query heads of a group are so many queries of their key head, so the fused kernel reads each
    key once; left to transformers' packing it takes two to ten times as long here.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    packed = query.reshape(1, key.shape[1], heads // key.shape[1], head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return out.reshape(1, 1, heads, head_dim)


def _narrow(query: Tensor) -> bool:
    """Whether `narrow_attention` serves: bfloat16 on a CPU, and no gradients wanted."""
    return (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    )


def narrow_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Attention whose products are all in the dtype of its inputs: [kv_heads, rows, head_dim].

    query [kv_heads, rows, head_dim]; key, value [kv_heads, keys, head_dim]; mask [rows, keys],
    added to the scores. The largest score of a row is guessed from a sample of the keys it sees
    and taken off inside the product, before scores are rounded to bfloat16: so it is small scores
    that are rounded finely, those of the keys that count, and softmax does not change.
    """
    rows, keys = mask.shape
    step = max(1, SCORE_BYTES // (keys * query.element_size()))
    scores = query.new_empty(min(step, rows), keys)
    out = torch.empty_like(query)
    sample = (query @ key[:, ::SAMPLED].transpose(1, 2)).mul_(scaling).add_(mask[:, ::SAMPLED])
    guess = sample.amax(-1, keepdim=True).nan_to_num_(neginf=0.0).neg_()
    for head in range(len(query)):
        turned = key[head].t()
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            block = scores[: part.stop - part.start]
            torch.addmm(guess[head, part], query[head, part], turned, alpha=scaling, out=block)
            block.add_(mask[part])
            torch.softmax(block, -1, out=block)
            torch.mm(block, value[head], out=out[head, part])
    return out


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
