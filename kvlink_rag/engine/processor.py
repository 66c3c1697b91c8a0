"""What this machine's processor multiplies by itself, and the dtype to compute in that follows.

Knows the processor's flags; no model.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")
_BFLOAT16 = re.compile(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", re.MULTILINE)
_VNNI = re.compile(r"^flags\s*:.*\b(?:avx512_vnni|avx_vnni)\b", re.MULTILINE)


@cache
def multiplies_bfloat16() -> bool:
    """Whether products in bfloat16 are the CPU's own (AVX-512 BF16, AMX, Arm BF16).

    Where they are not they are emulated, several times slower than float32; where the processor
    says nothing (other systems than Linux), they are taken not to be.
    """
    try:
        return _BFLOAT16.search(CPU_FACTS.read_text("utf-8")) is not None
    except OSError:
        return False


@cache
def adds_products_of_bytes() -> bool:
    """Whether the CPU adds products of bytes in 32 bits (VNNI); others do in 16, which overflow."""
    try:
        return _VNNI.search(CPU_FACTS.read_text("utf-8")) is not None
    except OSError:
        return False


def computing_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in on `device`, for weights that are kept in `own`.

    Their own on a GPU. On a CPU bfloat16 where it multiplies that, else float32; for float16
    always float32, which holds the same numbers, where bfloat16 would round them.
    """
    if device.type != "cpu" or own not in (torch.bfloat16, torch.float16):
        return own
    return own if own == torch.bfloat16 and multiplies_bfloat16() else torch.float32
