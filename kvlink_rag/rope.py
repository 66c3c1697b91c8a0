"""Position re-encoding: keys stored before RoPE are rotated to the place they take in a prompt.

Knows tensors and the "rotate half" convention of Llama, Mistral, Qwen2 and Qwen3; the cosines and
sines come from the model's own rotary module (`backbone`), which knows its scaling.
KVLink, arXiv 2502.16002, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_into(out: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write `keys` rotated by (`cos`, `sin`) into `out`, without a temporary.

    out, keys: [..., tokens, head_dim], not overlapping. cos, sin: [tokens, head_dim] in the dtype
    of `out`. Equals `keys * cos + rotate_half(keys) * sin`.
    """
    half = keys.shape[-1] // 2
    first, second = keys[..., :half], keys[..., half:]
    torch.mul(keys, cos, out=out)
    out[..., :half].addcmul_(second, sin[..., :half], value=-1)
    out[..., half:].addcmul_(first, sin[..., half:])
