"""Tensors of a GGUF file to one safetensors file, a few rows at a time.

A plain tensor keeps its dtype. A quantised one becomes float16: its steps are far coarser than
float16's, which bfloat16's are not for Q8_0, and float32 would double the file for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import FileIO
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kvlink_rag.disk.atomic_files import write_all
from kvlink_rag.errors import ConfigError, ModelNotSupported

from .metadata import PLAIN_TYPES, GGUFFile, GGUFTensor, dequantised

_SLAB = 1 << 22  # numbers at a time: 16 MiB of float32
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def write_weights(
    target: FileIO, file: GGUFFile, names: Mapping[str, str], heads: Mapping[str, int]
) -> None:
    """Write the weights `names` (transformers' name → tensor) to an empty file.

    heads: for tensors with interleaved halves, into how many heads their rows divide. The bytes
    are the same for the same GGUF file.
    """
    order = sorted(names, key=lambda name: (-_BYTES[_kept(file.tensors[names[name]])], name))
    header, start = {}, 0
    for name in order:
        tensor = file.tensors[names[name]]
        end = start + prod(tensor.shape) * _BYTES[_kept(tensor)]
        facts = {"dtype": _kept(tensor), "shape": tensor.shape, "data_offsets": [start, end]}
        header[name], start = facts, end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_all(target, memoryview(len(text).to_bytes(8, "little") + text))
    label = f"converting {file.path.name}"
    with tqdm(total=start, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        for name in order:
            for slab in _slabs(file.tensors[names[name]], heads.get(names[name])):
                write_all(target, slab.reshape(-1).view(np.uint8).data)
                bar.update(slab.nbytes)


def _kept(tensor: GGUFTensor) -> str:
    """The dtype a tensor is written in, as safetensors names it."""
    return tensor.type if tensor.type in PLAIN_TYPES else "F16"


def _slabs(tensor: GGUFTensor, heads: int | None) -> Iterator[npt.NDArray[Any]]:
    """The numbers of a tensor in its kept dtype (bfloat16 as its bits), some rows at a time."""
    count = len(tensor.rows)
    order = np.arange(count) if heads is None else _split_halves(tensor, heads)
    step = max(1, _SLAB // max(1, prod(tensor.shape) // count))
    for start in range(0, count, step):
        rows = order[start : start + step]
        if tensor.type == "BF16":
            yield np.ascontiguousarray(tensor.rows[rows]).view(np.uint16)
        elif tensor.type in PLAIN_TYPES:
            yield np.ascontiguousarray(tensor.rows[rows])
        else:
            yield _half(tensor, dequantised(tensor, rows))


def _split_halves(tensor: GGUFTensor, heads: int) -> npt.NDArray[np.int64]:
    """The order of rows that undoes the interleaving of each head's halves."""
    count = len(tensor.rows)
    if not heads or count % (2 * heads):
        raise ConfigError(f"the tensor {tensor.name} has {count} rows for {heads} heads")
    order: npt.NDArray[np.int64] = np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return order


def _half(tensor: GGUFTensor, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelNotSupported(f"the tensor {tensor.name} has numbers that float16 cannot hold")
    return half
