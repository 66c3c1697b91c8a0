"""As much of Triton as `rope_kernel` uses, one program after the other on CPU tensors.

It runs the kernel's own lines where Triton is not installed: pointers, masks, rounding. A load or
store that its mask allows outside of the tensor's memory raises `IndexError`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_program = [0, 0]  # the ids of the one that runs


class Pointer:
    """A tensor's memory from its first element on, and offsets into it."""

    def __init__(self, memory: Tensor, offsets: Tensor) -> None:
        self.memory, self.offsets = memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + more)


def pointer(tensor: Tensor) -> Pointer:
    size = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
    return Pointer(tensor.as_strided((size,), (1,)), torch.tensor(0))


def load(at: Pointer, *, mask: Tensor, other: float) -> Tensor:
    offsets, mask = torch.broadcast_tensors(at.offsets, mask)
    found = torch.full(offsets.shape, other, dtype=at.memory.dtype)
    found[mask] = at.memory[offsets[mask]]
    return found


def store(at: Pointer, value: Tensor, *, mask: Tensor) -> None:
    offsets, mask = torch.broadcast_tensors(at.offsets, mask)
    at.memory[offsets[mask]] = value[mask]


class Kernel:
    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            given = [pointer(a) if isinstance(a, Tensor) else a for a in arguments]
            for _program[:] in itertools.product(*map(range, grid)):
                self.function(*given, **constants)

        return launch


def modules() -> dict[str, ModuleType]:
    """`triton` and `triton.language`, for `sys.modules`."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(language).update(
        program_id=lambda axis: torch.tensor(_program[axis]),
        arange=torch.arange,
        load=load,
        store=store,
        int64=torch.int64,
        float32=torch.float32,
        constexpr=int,
    )
    vars(triton).update(jit=Kernel, cdiv=lambda a, b: -(-a // b), language=language)
    return {"triton": triton, "triton.language": language}
