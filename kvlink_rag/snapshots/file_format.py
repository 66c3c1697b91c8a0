"""Snapshot files: the identity of a snapshot, its bytes, and how many they are.

The format stands in `docs/formats.md`. Knows one file at a time; knows no directory, no database
and no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvlink_rag.disk.checked_file import Kind, read_sealed, sealed_size, write_sealed
from kvlink_rag.errors import ConfigError, SnapshotCorrupt

from .codecs import CODECS, Storage
from .snapshot import EXACT, AnySnapshot, Shape

FORMAT_VERSION = 1
KIND = Kind("kvlink-snapshot", FORMAT_VERSION, SnapshotCorrupt)


def snapshot_key(
    fingerprint: str, token_ids: Sequence[int], *, dtype: torch.dtype, codec: str = EXACT
) -> str:
    """The identity of a snapshot: 64 hexadecimal digits of SHA-256.

    Over format version, model fingerprint (which covers weights and RoPE parameters), the dtype
    and the codec it is kept in (`Storage`) and token ids. Link tokens do not enter: a snapshot does
    not depend on them.
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


def planned_size(shape: Shape, storage: Storage) -> int:
    """The bytes of a snapshot of `shape` (layers, kv_heads, tokens, head_dim) yet to be made."""
    sizes = storage.layout(shape)
    tensors = {n: torch.empty(size, dtype=kind, device="meta") for n, (kind, size) in sizes.items()}
    return sealed_size(tensors, KIND, _facts("0" * 64, storage.codec))


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
        snapshot = CODECS[codec].read(tensors)
    except ConfigError as error:
        raise SnapshotCorrupt(f"{path}: {error}") from error
    if token_ids is not None and not _same_ids(snapshot.token_ids, token_ids):
        raise SnapshotCorrupt(
            f"{path}: found other token ids ({len(snapshot.token_ids)}) than the passage's "
            f"({len(token_ids)})"
        )
    return snapshot


def _facts(key: str, codec: str) -> dict[str, str]:
    return {"key": key, "codec": codec}


def _same_ids(found: Tensor, expected: Sequence[int]) -> bool:
    return bool(np.array_equal(found.numpy(), np.asarray(expected, dtype=np.int64)))
