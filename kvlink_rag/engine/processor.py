"""What this machine's processor multiplies by itself. Knows its flags; no model and no tensor."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")
_BFLOAT16 = re.compile(r"^(?:flags|Features)\s*:.*\b(?:avx512_bf16|amx_bf16|bf16)\b", re.MULTILINE)


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
