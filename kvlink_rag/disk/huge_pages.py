"""What the kernel is told of memory: Linux's `madvise`, where there is one.

Knows addresses and lengths; does not know what lies there.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

MADV_HUGEPAGE = 14
LARGE = 4 << 20  # bytes; less has few pages to fault in


def prefer_huge(tensor: Tensor) -> bool:
    """Ask for huge pages under a large CPU tensor that was just made and not yet written to.

    A live cache is written once and then read: with pages of 4 KiB, most of the time it takes to
    write it goes into faulting them in, one by one. Whether the kernel agreed.
    """
    madvise = find_madvise()
    if madvise is None or tensor.device.type != "cpu" or tensor.nbytes < LARGE:
        return False
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return madvise(start, stop - start, MADV_HUGEPAGE) == 0


@functools.cache
def find_madvise() -> Callable[[int, int, int], int] | None:
    """`madvise(address, length, advice)`: 0, or -1 with `ctypes.get_errno()` set."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
