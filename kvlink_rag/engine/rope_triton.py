"""`rope.rotate_into` as one Triton kernel: keys are read once and written rotated, in one pass.

The same operations as in plain torch, with the same rounding: the product with the cosines is
rounded to the keys' dtype, the sum with the other half is rounded once more. Importing it needs
Triton, which torch for CUDA brings along.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # of one program


def can_rotate(out: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel is written for such tensors, see `rotate_into`."""
    half = keys.shape[-1] // 2
    dtypes = {t.dtype for t in (out, keys, cos, sin)}
    rows = all(t.stride(-1) == 1 for t in (out, keys, cos, sin))
    return (
        keys.dim() == out.dim() == 4
        and cos.dim() == sin.dim() == 2
        and keys.shape == out.shape
        and keys.numel() > 0
        and half & (half - 1) == 0
        and 2 * half == keys.shape[-1]
        and len(dtypes) == 1
        and rows
        and cos.stride(0) == sin.stride(0)
        and keys.shape[0] * keys.shape[1] < 1 << 16
    )


def rotate(out: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write `keys` [layers, kv_heads, tokens, head_dim], rotated, into `out`."""
    layers, heads, tokens, head_dim = keys.shape
    grid = (triton.cdiv(tokens, TOKENS), layers * heads)
    _rotate[grid](
        *(out, keys, cos, sin, tokens, heads),
        *(*out.stride()[:3], *keys.stride()[:3], cos.stride(0)),
        HALF=head_dim // 2,
        TOKENS=TOKENS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    out,
    keys,
    cos,
    sin,
    tokens,
    heads,
    out_layer,
    out_head,
    out_token,
    key_layer,
    key_head,
    key_token,
    cos_token,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One stretch of tokens of one layer and head."""
    layer = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None].to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    inside = (token < tokens) & (column < HALF)
    source = keys + layer * key_layer + head * key_head + token * key_token + column
    target = out + layer * out_layer + head * out_head + token * out_token + column
    angle = token * cos_token + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    low = (first * cos_first).to(kind).to(tl.float32) - second * sin_first
    high = (second * cos_second).to(kind).to(tl.float32) + first * sin_second
    tl.store(target, low.to(kind), mask=inside)
    tl.store(target + HALF, high.to(kind), mask=inside)
