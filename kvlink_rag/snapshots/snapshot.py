"""A snapshot: the keys and values of one passage, encoded alone, and its bytes.

Keys are stored before RoPE (KVLink, arXiv 2502.16002, section 3.2), so that one snapshot serves
at every position. Knows the file format and the identity of a snapshot; knows no directory, no
database and no model. The format stands in `docs/formats.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvlink_rag.arguments import CODECS, check_codec
from kvlink_rag.disk.checked_file import Kind, read_sealed, sealed_size, write_sealed
from kvlink_rag.engine.rope import rotate_into
from kvlink_rag.errors import ConfigError, SnapshotCorrupt

from . import quantised
from .quantised import Quantised, Shape, quantise

FORMAT_VERSION = 1
KIND = Kind("kvlink-snapshot", FORMAT_VERSION, SnapshotCorrupt)
EXACT = "exact"  # the codec of keys and values as they are, in the model's dtype
EXACT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = slice(None)  # layers


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

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is written, in order."""
        return {"token_ids": self.token_ids, "keys": self.keys, "values": self.values}

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
        """Write the keys, rotated by `cos` and `sin` [tokens, head_dim], and the values in place.

        keys, values: [layers, kv_heads, tokens, head_dim], of any device.
        """
        rotate_into(keys, self.keys.to(keys.device, non_blocking=True), cos, sin)
        values.copy_(self.values, non_blocking=True)


AnySnapshot: TypeAlias = Snapshot | Quantised


class Source(Protocol):
    """What assembly takes: a snapshot in the host's memory, or one in a device's.

    Methods and attributes as those of `Snapshot`.
    """

    @property
    def codec(self) -> str: ...

    @property
    def token_ids(self) -> Tensor: ...

    def part(self, layers: slice) -> AnySnapshot: ...

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...

    def fill(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None: ...


def in_codec(snapshot: Snapshot, codec: str) -> AnySnapshot:
    """`snapshot` as `codec` keeps it. Raises `ConfigError`, see `quantise`."""
    if check_codec(codec) == EXACT:
        return snapshot
    return quantise(codec, snapshot.keys, snapshot.values, snapshot.token_ids)


def snapshot_key(
    fingerprint: str, token_ids: Sequence[int], *, dtype: torch.dtype, codec: str = EXACT
) -> str:
    """The identity of a snapshot: 64 hexadecimal digits of SHA-256.

    Over format version, model fingerprint (which covers weights and RoPE parameters), dtype,
    codec and token ids. Link tokens do not enter: a snapshot does not depend on them.
    """
    facts = [KIND.format, FORMAT_VERSION, fingerprint, str(dtype), codec]
    head = json.dumps(facts, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    ids = np.asarray(token_ids, dtype="<i8").tobytes()
    return hashlib.sha256(head + b"\n" + ids).hexdigest()


def write_snapshot(file: FileIO, snapshot: AnySnapshot, key: str, *, compress: bool = False) -> int:
    """Write `snapshot` to an unbuffered `file` and return the bytes written.

    Contiguous CPU tensors are written from their own memory. compress: losslessly, by zstd. Raises
    `OSError` where the file cannot be written, `MissingExtra` without zstandard.
    """
    facts = _facts(key, snapshot.codec)
    return write_sealed(file, KIND, snapshot.tensors, facts, compress=compress)


def snapshot_size(snapshot: AnySnapshot, key: str) -> int:
    """The bytes that `write_snapshot` would write; the most it would write with `compress`."""
    return sealed_size(snapshot.tensors, KIND, _facts(key, snapshot.codec))


def planned_size(shape: Shape, dtype: torch.dtype, codec: str) -> int:
    """The bytes of a snapshot of `shape` (layers, kv_heads, tokens, head_dim) yet to be made."""
    if check_codec(codec) == EXACT:
        sizes = {"token_ids": (torch.int64, [shape[2]])}
        sizes |= dict.fromkeys(("keys", "values"), (dtype, list(shape)))
    else:
        sizes = quantised.CODECS[codec].layout(shape)
    tensors = {n: torch.empty(size, dtype=kind, device="meta") for n, (kind, size) in sizes.items()}
    return sealed_size(tensors, KIND, _facts("0" * 64, codec))


def read_snapshot(
    path: Path, *, key: str | None = None, token_ids: Sequence[int] | None = None
) -> AnySnapshot:
    """The snapshot at `path`, verified: checksum, key, and the real token ids where given.

    The tensors are views of a private mapping: nothing is copied, and they stay valid after the
    file is removed. Raises `SnapshotCorrupt` (found, expected) for any other bytes than those
    written, another format version too; `FileNotFoundError` or `OSError` where it cannot be read.
    """
    tensors, facts = read_sealed(path, KIND)
    if key is not None and facts.get("key") != key:
        raise SnapshotCorrupt(f"{path}: found key {facts.get('key')!r}, expected {key!r}")
    codec = facts.get("codec", "")
    if codec not in CODECS:
        raise SnapshotCorrupt(f"{path}: found codec {codec!r}, expected one of {sorted(CODECS)}")
    try:
        snapshot = _exact(tensors) if codec == EXACT else Quantised(codec, tensors)
    except ConfigError as error:
        raise SnapshotCorrupt(f"{path}: {error}") from error
    if token_ids is not None and not _same_ids(snapshot.token_ids, token_ids):
        raise SnapshotCorrupt(
            f"{path}: found other token ids ({len(snapshot.token_ids)}) than the passage's "
            f"({len(token_ids)})"
        )
    return snapshot


def _exact(tensors: Mapping[str, Tensor]) -> Snapshot:
    """The snapshot of what `Snapshot.tensors` gave. Raises `ConfigError`."""
    if list(tensors) != ["token_ids", "keys", "values"]:
        raise ConfigError(f"found tensors {list(tensors)}, expected token_ids, keys, values")
    return Snapshot(tensors["keys"], tensors["values"], tensors["token_ids"])


def _facts(key: str, codec: str) -> dict[str, str]:
    return {"key": key, "codec": codec}


def _same_ids(found: Tensor, expected: Sequence[int]) -> bool:
    return bool(np.array_equal(found.numpy(), np.asarray(expected, dtype=np.int64)))


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
