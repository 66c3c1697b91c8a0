"""Grouped-query attention under a mask, without copies of keys and values.

transformers repeats key and value heads for every query head as soon as there is a mask: at 2,000
cached tokens more bytes move than the products need. Here the query heads of a group are laid
beside each other as more queries of one key head, and the mask is repeated once for all layers.
Knows tensors and transformers' attention interface; registered under `NAME`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvlink_grouped"


def pack_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """bool [queries, keys] to additive [1, 1, groups * queries, keys] in `dtype`."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    additive.masked_fill_(~mask, -torch.inf)
    return additive.repeat(groups, 1)[None, None]


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: [1, queries, heads, head_dim].

    query [1, heads, queries, head_dim]; key, value [1, kv_heads, keys, head_dim]; attention_mask
    from `pack_mask`. Without such a mask, or for a batch, transformers' own function takes over.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if batch != 1 or attention_mask is None or attention_mask.shape[2] != groups * queries:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    packed = query.reshape(1, kv_heads, groups * queries, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(1, heads, queries, head_dim).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
