"""A snapshot: the keys and values of one passage, encoded alone, and what stands for one.

Keys are stored before RoPE (KVLink, arXiv 2502.16002, section 3.2), so that one snapshot serves
at every position. Knows tensors; knows no file, no other codec and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvlink_rag.engine.rope import rotate_into
from kvlink_rag.errors import ConfigError

EXACT = "exact"  # the codec of keys and values as they are, in the model's dtype
BF16 = "bf16"  # the codec of keys and values in bfloat16: files of the codec above
EXACT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = slice(None)  # layers
SLAB = 128  # tokens that are brought to another dtype at a time, all layers: a few MiB

Shape = tuple[int, int, int, int]  # layers, kv_heads, tokens, head_dim
TensorLayout = dict[str, tuple[torch.dtype, list[int]]]  # by name, in the file's order


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Keys before RoPE and values of one passage, all layers in one tensor each.

    keys, values: float32, bfloat16 or float16 [layers, kv_heads, tokens, head_dim].
    token_ids: int64 [tokens], tokens >= 1.
    Raises `ConfigError` where shapes or dtypes do not fit together.
    """

    keys: Tensor
    values: Tensor
    token_ids: Tensor

    def __post_init__(self) -> None:
        if problem := _problem(self.keys, self.values, self.token_ids):
            raise ConfigError(f"not a snapshot: {problem}")

    @property
    def codec(self) -> str:
        """Its codec: none."""
        return EXACT

    def codec_for(self, dtype: torch.dtype) -> str:
        """Its codec to a model that computes in `dtype`: "exact" only where that is its own."""
        return kept_as(self.keys.dtype, dtype)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is written, in order."""
        return {"token_ids": self.token_ids, "keys": self.keys, "values": self.values}

    @property
    def shape(self) -> Shape:
        """(layers, kv_heads, tokens, head_dim)."""
        layers, heads, tokens, width = self.keys.shape
        return layers, heads, tokens, width

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors in memory."""
        return self.keys.nbytes + self.values.nbytes + self.token_ids.nbytes

    def moved(self, move: Callable[[Tensor], Tensor]) -> Snapshot:
        """The snapshot of what `move` makes of keys and values, such as copies elsewhere."""
        return Snapshot(move(self.keys), move(self.values), self.token_ids)

    def part(self, layers: slice) -> Snapshot:
        """Some layers, as views."""
        return self if layers == ALL else self.moved(lambda tensor: tensor[layers])

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values in `dtype`."""
        return self.keys.to(dtype), self.values.to(dtype)

    def fill(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Write the keys, rotated by `cos` and `sin`, and the values in place.

        keys, values: [layers, kv_heads, tokens, head_dim], of any device. cos, sin: as `Rotation`
        gives them. Where they have another dtype, the numbers are brought to it first: never more
        than a slab beside what is written.
        """
        own, tokens = self.keys.to(keys.device, non_blocking=True), len(self.token_ids)
        slab = tokens if keys.is_cuda or own.dtype == keys.dtype else SLAB  # there, fewer kernels
        for at in (slice(start, start + slab) for start in range(0, tokens, slab)):
            plain = own[:, :, at].to(keys.dtype)
            rotate_into(keys[:, :, at], plain, cos[..., at, :], sin[..., at, :])
        values.copy_(self.values, non_blocking=True)


class Source(Protocol):
    """What assembly takes: a snapshot in the host's memory, or one in a device's.

    Methods and attributes as those of `Snapshot`.
    """

    @property
    def codec(self) -> str: ...

    @property
    def token_ids(self) -> Tensor: ...

    def codec_for(self, dtype: torch.dtype) -> str: ...

    def part(self, layers: slice) -> AnySnapshot: ...

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...

    def fill(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None: ...


class AnySnapshot(Source, Protocol):
    """A snapshot of any codec in the host's memory. Methods and attributes as those of `Snapshot`.

    tensors: what is written, in order: "token_ids", "keys", "values" and what else the codec has.
    """

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def nbytes(self) -> int: ...

    def moved(self, move: Callable[[Tensor], Tensor]) -> AnySnapshot: ...


def kept_as(dtype: torch.dtype, computed: torch.dtype) -> str:
    """The codec of numbers kept in `dtype` to a model that computes in `computed`."""
    if dtype == computed:
        return EXACT
    return BF16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def _problem(keys: Tensor, values: Tensor, token_ids: Tensor) -> str | None:
    """What is wrong with the three tensors of a snapshot, if anything."""
    if keys.dtype not in EXACT_DTYPES or values.dtype != keys.dtype:
        return f"found keys {keys.dtype}, values {values.dtype}, expected one of {EXACT_DTYPES}"
    if keys.dim() != 4 or keys.shape != values.shape or 0 in keys.shape:
        shapes = f"keys {list(keys.shape)}, values {list(values.shape)}"
        return f"found {shapes}, expected [layers, kv_heads, tokens, head_dim] for both"
    if token_ids.dtype != torch.int64 or list(token_ids.shape) != [keys.shape[2]]:
        found = f"{token_ids.dtype} {list(token_ids.shape)}"
        return f"found token ids {found}, expected int64 [{keys.shape[2]}]"
    return None
