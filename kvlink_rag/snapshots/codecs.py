"""The registry of codecs: by name, how a snapshot becomes one of that codec and is read again.

A codec joins with a row here, its name in `arguments.CODECS`, and its tests. `Storage` is how one
collection keeps its snapshots, whatever its model computes in. Knows tensors; knows no file, no
store and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.arguments import check_codec
from kvlink_rag.errors import ConfigError

from .quantised import SCHEMES, Quantised, Scheme, quantise
from .snapshot import BF16, EXACT, AnySnapshot, Shape, Snapshot, TensorLayout, kept_as


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


@dataclass(frozen=True, slots=True)
class Storage:
    """How snapshots are kept: what their keys, files and a collection's identity go by.

    codec: a row of `CODECS`. dtype: of the keys and values that "exact" writes; what is quantised
    has no dtype of its own, and only goes by the name of the one it was first made from.
    """

    codec: str
    dtype: torch.dtype

    @classmethod
    def of(cls, codec: str, computed: torch.dtype) -> Storage:
        """What the name `codec` means to a model that computes in `computed`.

        Raises `ConfigError` where there is no such codec.
        """
        if check_codec(codec) == BF16:
            return cls(EXACT, torch.bfloat16)
        return cls(codec, computed)

    @property
    def dtype_name(self) -> str:
        """The dtype, without its module."""
        return str(self.dtype).removeprefix("torch.")

    def codec_for(self, computed: torch.dtype) -> str:
        """The codec to a model that computes in `computed`, see `Snapshot.codec_for`."""
        return kept_as(self.dtype, computed) if self.codec == EXACT else self.codec

    def takes(self, computed: torch.dtype) -> bool:
        """Whether what is computed in `computed` has all the digits that are written."""
        digits = torch.finfo(computed).eps <= torch.finfo(self.dtype).eps
        return digits or self.codec != EXACT

    def keep(self, snapshot: Snapshot) -> AnySnapshot:
        """`snapshot`, as its model made it, as it is kept.

        Raises `ConfigError` for numbers beyond the dtype's, and see `quantise`.
        """
        if self.codec != EXACT or snapshot.keys.dtype == self.dtype:
            return CODECS[self.codec].encode(snapshot)
        kept = snapshot.moved(lambda numbers: numbers.to(self.dtype))
        if not (bool(kept.keys.isfinite().all()) and bool(kept.values.isfinite().all())):
            raise ConfigError(
                f"found keys or values that are not finite in {self.dtype_name}, in which these "
                "snapshots are kept; keep them in another codec with reencode=True (kvlink-rag: "
                "index --codec … --reencode)"
            )
        return kept

    def layout(self, shape: Shape) -> TensorLayout:
        """The tensors of a passage of `shape`, see `Codec`."""
        return CODECS[self.codec].layout(shape, self.dtype)


def default_codec(dtype: object, device: torch.device) -> str:
    """The codec of a new collection where nobody names one: "bf16" where a CPU chooses the dtype.

    Some CPUs compute in bfloat16 then and others in float32 (`engine.processor`): what one keeps
    the other reads, in half the bytes of float32. "exact" where `dtype` was named, and on a GPU.
    """
    return BF16 if dtype == "auto" and device.type == "cpu" else EXACT


def in_codec(snapshot: Snapshot, codec: str) -> AnySnapshot:
    """`snapshot`, as its model made it, as `codec` keeps it. Errors as in `Storage.keep`."""
    return Storage.of(codec, snapshot.keys.dtype).keep(snapshot)


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
