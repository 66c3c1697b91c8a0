"""Position re-encoding: keys stored before RoPE are rotated to the place they take in a prompt.

Knows tensors and the "rotate half" convention of Llama, Mistral, Qwen and Gemma; the cosines and
sines come from the model's own rotary module (`backbone`), which knows its scaling.
KVLink, arXiv 2502.16002, section 3.2.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_refused: set[str] = set()  # why the kernel is not used any more, told once


@dataclass(frozen=True, slots=True)
class Rotation:
    """The cosines and sines of some positions, in a model's dtype.

    cos, sin: [tokens, turned], or [layers, 1, tokens, turned] where layers differ; turned: of a
    head's numbers the first so many, head_dim but in a model that turns a part of each head.
    """

    cos: Tensor
    sin: Tensor

    def part(self, tokens: slice | Tensor, layers: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Those of some tokens and layers, as `rotate_into` takes them."""
        if self.cos.dim() == 2:
            return self.cos[tokens], self.sin[tokens]
        return self.cos[layers, :, tokens], self.sin[layers, :, tokens]

    def of_layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Those of one layer: [tokens, turned] each."""
        if self.cos.dim() == 2:
            return self.cos, self.sin
        return self.cos[number, 0], self.sin[number, 0]


def rotate_into(out: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write `keys` rotated by (`cos`, `sin`) into `out`, without a temporary.

    out, keys: [..., tokens, head_dim], not overlapping. cos, sin: [tokens, turned], or what goes
    with `out` where layers differ, in its dtype. Equals `keys * cos + rotate_half(keys) * sin` in
    the first `turned` numbers of each head; the others are copied. One kernel on CUDA where Triton
    is.
    """
    turned = cos.shape[-1]
    if turned < keys.shape[-1]:
        out[..., turned:] = keys[..., turned:]
        out, keys = out[..., :turned], keys[..., :turned]
    if out.is_cuda and _rotated_by_kernel(out, keys, cos, sin):
        return
    half = turned // 2
    first, second = keys[..., :half], keys[..., half:]
    torch.mul(keys, cos, out=out)
    out[..., :half].addcmul_(second, sin[..., :half], value=-1)
    out[..., half:].addcmul_(first, sin[..., half:])


def _rotated_by_kernel(out: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the Triton kernel has done it; where it fails once it is not tried again."""
    kernel = _kernel()
    here = out.device.index == torch.cuda.current_device()  # where a kernel would be launched
    if kernel is None or _refused or not here or not kernel.can_rotate(out, keys, cos, sin):
        return False
    try:
        kernel.rotate(out, keys, cos, sin)
    except Exception as error:  # whatever a compiler raises: plain torch gives the same
        _refused.add(str(error))
        logger.warning("the Triton kernel for rotation is not used: %s", error)
        return False
    return True


@functools.cache
def _kernel() -> ModuleType | None:
    """`rope_triton`, or None without Triton."""
    try:
        from . import rope_triton
    except ImportError as error:
        logger.info("no Triton, rotation runs in plain torch: %s", error)
        return None
    return rope_triton
