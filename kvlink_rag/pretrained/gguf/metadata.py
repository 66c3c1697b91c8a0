"""What a GGUF file says about itself: typed fields and tensors.

The only file that knows the `gguf` package. Knows no architecture. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvlink_rag.errors import ConfigError, ModelNotSupported, first_line

T = TypeVar("T")
Array = npt.NDArray[Any]

# Types whose values are kept as they are; all others are quantised.
PLAIN_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor. shape: as numpy and transformers have it, rows first. type: such as "Q4_K".

    rows: the bytes or numbers of the file [rows, ...], mapped; rows can be taken apart, since a
    block of quantised numbers never spans two. A vector has one row.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    rows: Array


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a file holds. fields: plain values and lists of them; tensors: by name, mapped."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The field `key`, a `kind` (a float may be written as int); where it is not, `default`.

        Raises `ModelNotSupported` where it is of another type, `ConfigError` where it is missing
        without a default.
        """
        if key not in self.fields:
            if default is None:
                raise ConfigError(f"{self.path} has no field {key}; convert the model again")
            return default
        value = self.fields[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelNotSupported(
                f"{self.path}: the field {key} is {_short(value)}, expected {kind.__name__}"
            )
        found: T = value
        return found


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file. Raises `ConfigError` where it is none or is damaged."""
    import gguf  # here: most commands read no such file

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
    except Exception as error:  # the reader trusts the file: it raises whatever comes of it
        raise ConfigError(
            f"{path} is not a whole GGUF file: {first_line(error)}; fetch it again"
        ) from error
    if reader.byte_order != "I":
        raise ModelNotSupported(f"{path} has another byte order than this machine")
    return GGUFFile(path, fields, tensors)


def dequantised(tensor: GGUFTensor, rows: slice | Array) -> npt.NDArray[np.float32]:
    """Some rows of a tensor as float32 [rows, ...]. Raises `ModelNotSupported`."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[tensor.type]
        values: npt.NDArray[np.float32] = gguf.dequantize(tensor.rows[rows], kind)
    except NotImplementedError as error:
        raise ModelNotSupported(
            f"the tensor {tensor.name} is quantised as {tensor.type}, which the gguf package "
            "cannot read; take a file of Q4_K, Q8_0 or F16"
        ) from error
    return values


def _tensor(found: Any) -> GGUFTensor:
    shape = tuple(int(size) for size in reversed(found.shape))
    rows = found.data.reshape(shape[0] if len(shape) > 1 else 1, -1)
    return GGUFTensor(found.name, found.tensor_type.name, shape, rows)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
