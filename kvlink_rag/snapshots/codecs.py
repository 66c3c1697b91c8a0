"""The registry of codecs: by name, how a snapshot becomes one of that codec and is read again.

A codec joins with a row here, its name in `arguments.CODECS`, and its tests. Knows tensors; knows
no file, no store and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.arguments import check_codec
from kvlink_rag.errors import ConfigError

from .quantised import SCHEMES, Quantised, Scheme, quantise
from .snapshot import EXACT, AnySnapshot, Shape, Snapshot, TensorLayout


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to keep a passage's keys and values.

    encode: an exact snapshot to one kept so. read: the tensors of a file, in its order, to the
    snapshot; raises `ConfigError` for others than `encode` gives. layout: these tensors' names,
    dtypes and shapes for a passage whose exact ones are of that shape and dtype.
    """

    encode: Callable[[Snapshot], AnySnapshot]
    read: Callable[[dict[str, Tensor]], AnySnapshot]
    layout: Callable[[Shape, torch.dtype], TensorLayout]


def in_codec(snapshot: Snapshot, codec: str) -> AnySnapshot:
    """`snapshot` as `codec` keeps it. Raises `ConfigError`, see `quantise`."""
    return CODECS[check_codec(codec)].encode(snapshot)


def _read_exact(tensors: dict[str, Tensor]) -> Snapshot:
    """The snapshot of what `Snapshot.tensors` gave. Raises `ConfigError`."""
    if list(tensors) != ["token_ids", "keys", "values"]:
        raise ConfigError(f"found tensors {list(tensors)}, expected token_ids, keys, values")
    return Snapshot(tensors["keys"], tensors["values"], tensors["token_ids"])


def _exact_layout(shape: Shape, dtype: torch.dtype) -> TensorLayout:
    states = (dtype, list(shape))
    return {"token_ids": (torch.int64, [shape[2]]), "keys": states, "values": states}


def _quantised(scheme: Scheme) -> Codec:
    name = scheme.name
    return Codec(
        lambda exact: quantise(name, exact.keys, exact.values, exact.token_ids),
        lambda tensors: Quantised(name, tensors),
        lambda shape, dtype: scheme.layout(shape),
    )


CODECS: Mapping[str, Codec] = {
    EXACT: Codec(lambda exact: exact, _read_exact, _exact_layout),
    **{name: _quantised(scheme) for name, scheme in SCHEMES.items()},
}
