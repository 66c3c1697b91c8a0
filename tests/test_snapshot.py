"""The bytes of a snapshot: golden, read by safetensors, and refused when anything is changed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from storage_workers import make_snapshot, same

from kvlink_rag.arguments import CODECS
from kvlink_rag.errors import ConfigError, SnapshotCorrupt
from kvlink_rag.snapshots.file_format import (
    read_snapshot,
    snapshot_key,
    snapshot_size,
    write_snapshot,
)
from kvlink_rag.snapshots.snapshot import Snapshot

KEY = "ab" * 32
GOLDEN_HEADER = (
    '{"__metadata__":{"checksum":"xxh3_128:%s","codec":"exact","format":"kvlink-snapshot",'
    '"key":"' + KEY + '","version":"1"},'
    '"token_ids":{"dtype":"I64","shape":[3],"data_offsets":[0,24]},'
    '"keys":{"dtype":"F32","shape":[1,1,3,2],"data_offsets":[24,48]},'
    '"values":{"dtype":"F32","shape":[1,1,3,2],"data_offsets":[48,72]}}'
)
GOLDEN_CHECKSUM = "5a441d939d34627e6442abc4c0fe42d3"
GOLDEN_SHA256 = "b33d0b9e36678ab5d48df880daccf091dc5dd8beeb174a0a538293ed1029ddce"


def golden_snapshot() -> Snapshot:
    keys = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e-3, 3e8]).view(1, 1, 3, 2)
    return Snapshot(keys, -keys, torch.tensor([7, 128255, 0]))


def write(path: Path, snapshot: Snapshot, key: str = KEY) -> Path:
    with FileIO(path, "w") as file:
        assert write_snapshot(file, snapshot, key) == file.tell()
    return path


def forge(
    entries: dict[str, Any],
    data: bytes,
    *,
    metadata: dict[str, str] | None = None,
    header: str = "",
) -> bytes:
    """A file with any header and the checksum that fits it, written from `docs/formats.md`."""
    facts = {
        "checksum": "xxh3_128:" + "0" * 32,
        "codec": "exact",
        "format": "kvlink-snapshot",
        "key": KEY,
        "version": "1",
        **(metadata or {}),
    }
    text = (
        header or json.dumps({"__metadata__": facts, **entries}, separators=(",", ":"))
    ).encode()
    first = next(iter(entries.values()), {}).get("data_offsets", [0, 0])
    text += b" " * (-(8 + len(text) + (first[1] if isinstance(first, list) else 0)) % 64)
    unsealed = struct.pack("<Q", len(text)) + text
    digest = xxhash.xxh3_128(unsealed + data).hexdigest().encode()
    return unsealed.replace(b"0" * 32, digest, 1) + data


def entries_of(shape: Sequence[int], dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    ids, data = 8 * shape[2], size * int(np.prod(shape))
    return {
        "token_ids": {"dtype": "I64", "shape": [shape[2]], "data_offsets": [0, ids]},
        "keys": {"dtype": dtype, "shape": list(shape), "data_offsets": [ids, ids + data]},
        "values": {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [ids + data, ids + 2 * data],
        },
    }


def test_golden_bytes(tmp_path: Path) -> None:
    written = write(tmp_path / "s", golden_snapshot()).read_bytes()
    length = struct.unpack("<Q", written[:8])[0]
    assert written[8 : 8 + length].decode().rstrip(" ") == GOLDEN_HEADER % GOLDEN_CHECKSUM
    assert hashlib.sha256(written).hexdigest() == GOLDEN_SHA256
    assert len(written) == snapshot_size(golden_snapshot(), KEY)


def test_bytes_follow_from_the_documented_format(tmp_path: Path) -> None:
    snapshot = golden_snapshot()
    data = struct.pack("<3q", 7, 128255, 0)
    data += snapshot.keys.numpy().astype("<f4").tobytes()
    data += snapshot.values.numpy().astype("<f4").tobytes()
    written = write(tmp_path / "s", snapshot).read_bytes()
    assert written == forge(entries_of([1, 1, 3, 2]), data)
    length = struct.unpack("<Q", written[:8])[0]
    assert (8 + length + 3 * 8) % 64 == 0  # where the keys start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 200])
def test_safetensors_reads_what_we_write(tmp_path: Path, dtype: torch.dtype, tokens: int) -> None:
    snapshot = make_snapshot(3, tokens, dtype)
    path = write(tmp_path / "s.safetensors", snapshot)
    loaded = load_file(path)
    assert set(loaded) == {"keys", "values", "token_ids"}
    assert same(Snapshot(**loaded), snapshot)
    with safe_open(path, "pt") as opened:
        facts = opened.metadata()
    assert facts["format"] == "kvlink-snapshot"
    assert (facts["key"], facts["codec"], facts["version"]) == (KEY, "exact", "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    snapshot = make_snapshot(1, 9, dtype)
    read = read_snapshot(write(tmp_path / "s", snapshot), key=KEY, token_ids=range(1, 10))
    assert same(read, snapshot)
    assert read.keys.dtype == dtype
    assert read.nbytes == snapshot.nbytes


def test_views_of_other_memory_are_written_right(tmp_path: Path) -> None:
    whole = torch.randn(2, 5, 2, 8)
    part = whole.transpose(1, 2)[..., ::2]  # not contiguous
    snapshot = Snapshot(part, part + 1, torch.arange(10)[::2])
    assert same(read_snapshot(write(tmp_path / "s", snapshot)), snapshot)


def test_tensors_outlive_the_file_and_never_write_to_it(tmp_path: Path) -> None:
    path = write(tmp_path / "s", make_snapshot(4))
    before = path.read_bytes()
    read = read_snapshot(path)
    read.keys.zero_()  # private: the caller may do as it likes
    assert path.read_bytes() == before
    again = read_snapshot(path)
    path.unlink()
    assert same(again, make_snapshot(4))


def test_no_file_descriptor_stays_open(tmp_path: Path) -> None:
    path = write(tmp_path / "s", make_snapshot(4))
    before = len(os.listdir("/proc/self/fd"))
    kept = [read_snapshot(path) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(kept) == 20


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "s", golden_snapshot())
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(good)):
            byte = good[bit // 8 : bit // 8 + 1]
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
            with pytest.raises(SnapshotCorrupt):
                read_snapshot(path)
            os.pwrite(file.fileno(), byte, bit // 8)
    read_snapshot(path)


def test_every_truncation_and_any_addition_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "s", golden_snapshot())
    good = path.read_bytes()
    for number, bad in enumerate([*(good[:n] for n in range(len(good))), good + b"\0", 2 * good]):
        path = tmp_path / str(number)
        path.write_bytes(bad)
        with pytest.raises(SnapshotCorrupt, match=r"found .* expected"):
            read_snapshot(path)


def test_key_and_token_ids_are_confirmed(tmp_path: Path) -> None:
    path = write(tmp_path / "s", golden_snapshot())
    read_snapshot(path, key=KEY, token_ids=[7, 128255, 0])
    with pytest.raises(SnapshotCorrupt, match="found key"):
        read_snapshot(path, key="cd" * 32)
    for other in ([7, 128255], [7, 128255, 1], [7, 128255, 0, 0], []):
        with pytest.raises(SnapshotCorrupt, match="token ids"):
            read_snapshot(path, token_ids=other)


ZERO = b"\0" * 72
GOOD = entries_of([1, 1, 3, 2])
FORGED = {
    "overlap": {**GOOD, "values": {**GOOD["values"], "data_offsets": [24, 48]}},
    "hole": {**GOOD, "values": {**GOOD["values"], "data_offsets": [56, 80]}},
    "backwards": {**GOOD, "values": {**GOOD["values"], "data_offsets": [72, 48]}},
    "negative offset": {**GOOD, "keys": {**GOOD["keys"], "data_offsets": [-24, 48]}},
    "float keys": {**GOOD, "keys": {**GOOD["keys"], "dtype": "F64"}},
    "integer keys": {**GOOD, "keys": {**GOOD["keys"], "dtype": "I8"}},
    "two dtypes": {**GOOD, "values": {**GOOD["values"], "dtype": "BF16"}},
    "dtype a list": {**GOOD, "keys": {**GOOD["keys"], "dtype": ["F32"]}},
    "no dtype": {**GOOD, "keys": {"shape": [1], "data_offsets": [24, 48]}},
    "not an object": {**GOOD, "keys": [1, 2, 3]},
    "huge shape": {**GOOD, "keys": {**GOOD["keys"], "shape": [1 << 40, 1 << 40, 3, 2]}},
    "negative shape": {**GOOD, "keys": {**GOOD["keys"], "shape": [-1, -1, 3, 2]}},
    "boolean shape": {**GOOD, "keys": {**GOOD["keys"], "shape": [True, True, 3, 2]}},
    "float shape": {**GOOD, "keys": {**GOOD["keys"], "shape": [1.0, 1, 3, 2]}},
    "many dimensions": {**GOOD, "keys": {**GOOD["keys"], "shape": [1] * 1000}},
    "other tensor": {**GOOD, "more": {"dtype": "U8", "shape": [0], "data_offsets": [72, 72]}},
    "no values": {name: GOOD[name] for name in ("token_ids", "keys")},
    "other order": {name: GOOD[name] for name in ("keys", "values", "token_ids")},
    "extra field": {**GOOD, "keys": {**GOOD["keys"], "more": 1}},
    "swapped axes": {**GOOD, "keys": {**GOOD["keys"], "shape": [1, 1, 2, 3]}},
    "nothing": {},
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_structure_with_a_fitting_checksum_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s"
    path.write_bytes(forge(GOOD, ZERO))
    read_snapshot(path)  # the forger works
    path.write_bytes(forge(FORGED[name], ZERO))
    with pytest.raises(SnapshotCorrupt):
        read_snapshot(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "found format version '2', expected '1'"),
        ({"version": ""}, "format version"),
        ({"format": "kvlink-index"}, "found format 'kvlink-index', expected 'kvlink-snapshot'"),
        ({"codec": "int3"}, "found codec 'int3'"),
        ({"codec": "int4"}, "not a snapshot of codec int4"),
        ({"codec": "__class__"}, "found codec"),
        ({"checksum": "sha256:" + "0" * 32}, "header"),
    ],
)
def test_forged_facts_are_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    (tmp_path / "s").write_bytes(forge(GOOD, ZERO, metadata=metadata))
    with pytest.raises(SnapshotCorrupt, match=message):
        read_snapshot(tmp_path / "s")


@pytest.mark.parametrize(
    "header",
    [
        "[" * 30000,
        '{"__metadata__":' * 3000,
        "null",
        "[]",
        '{"__metadata__":null}',
        '{"__metadata__":{"format":1}}',
        '{"a":' + "9" * 5000 + "}",
        '{"__metadata__":{"format":"kvlink-snapshot","version":"1"},"__metadata__":{}}',
        "\ufeff{}",
        '{"é":1}',
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "s").write_bytes(forge({}, ZERO, header=header))
    with pytest.raises(SnapshotCorrupt):
        read_snapshot(tmp_path / "s")


@pytest.mark.parametrize("length", [0, 1, 65537, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_header_length_is_bounded(tmp_path: Path, length: int) -> None:
    (tmp_path / "s").write_bytes(struct.pack("<Q", length) + b" " * 100_000)
    with pytest.raises(SnapshotCorrupt, match="header of"):
        read_snapshot(tmp_path / "s")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    for content in (data, struct.pack("<Q", len(data)) + data, forge(GOOD, data)):
        path = tmp_path_factory.getbasetemp() / secrets.token_hex(8)
        path.write_bytes(content)
        if len(data) != len(ZERO):
            with pytest.raises(SnapshotCorrupt):
                read_snapshot(path)


def test_a_plain_safetensors_file_is_refused(tmp_path: Path) -> None:
    snapshot = golden_snapshot()
    tensors = {"keys": snapshot.keys, "values": snapshot.values, "token_ids": snapshot.token_ids}
    save_file(tensors, tmp_path / "s")
    with pytest.raises(SnapshotCorrupt):
        read_snapshot(tmp_path / "s")


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", golden_snapshot())
    (tmp_path / "link").symlink_to(good)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "directory", "fifo"):
        with pytest.raises(SnapshotCorrupt, match="expected a regular file"):
            read_snapshot(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_snapshot(tmp_path / "missing")


@pytest.mark.parametrize(
    ("keys", "values", "ids"),
    [
        (torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), torch.arange(3)),
        (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 2), torch.arange(3)),
        (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2).half(), torch.arange(3)),
        (torch.zeros(1, 1, 3, 2).double(), torch.zeros(1, 1, 3, 2).double(), torch.arange(3)),
        (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.arange(2)),
        (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.arange(3.0)),
        (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), torch.arange(3).int()),
        (torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0, 2), torch.arange(0)),
    ],
)
def test_what_is_no_snapshot_cannot_be_made(
    keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor
) -> None:
    with pytest.raises(ConfigError, match=r"found .* expected"):
        Snapshot(keys, values, ids)


def test_snapshot_key_is_the_documented_hash() -> None:
    key = snapshot_key("model", [1, 2, 128255], dtype=torch.bfloat16)
    text = b'["kvlink-snapshot",1,"model","torch.bfloat16","exact"]\n'
    assert key == hashlib.sha256(text + struct.pack("<3q", 1, 2, 128255)).hexdigest()


identities = st.tuples(
    st.text(max_size=8),
    st.lists(st.integers(0, 300000), max_size=5).map(tuple),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(sorted(CODECS)) | st.text(max_size=4),
)


@settings(deadline=None)
@given(identities, identities)
def test_snapshot_keys_differ_where_anything_differs(a: Any, b: Any) -> None:
    keys = [snapshot_key(f, ids, dtype=dtype, codec=codec) for f, ids, dtype, codec in (a, b)]
    assert (keys[0] == keys[1]) == (a == b)
