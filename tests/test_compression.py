"""Compressed snapshots: the same tensors back, bounded memory, the store, a collection, a plan."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, WordEmbedder
from storage_workers import make_snapshot

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.cli import terminal
from kvlink_rag.disk import checked_file as sealed
from kvlink_rag.disk.checked_file import _checksum, _header, require_compression
from kvlink_rag.errors import ConfigError, MissingExtra, SnapshotCorrupt
from kvlink_rag.ingest.estimate import plan
from kvlink_rag.ingest.readers import find
from kvlink_rag.snapshots.codecs import in_codec
from kvlink_rag.snapshots.file_format import KIND, read_snapshot, snapshot_size, write_snapshot
from kvlink_rag.snapshots.snapshot import AnySnapshot, Snapshot
from kvlink_rag.snapshots.store import SnapshotStore

KEY = "ab" * 32


def compressible(dtype: torch.dtype = torch.bfloat16) -> Snapshot:
    """Numbers like those of a model: their exponents are much alike."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 2, 48, 32, generator=generator).to(dtype)
    return Snapshot(states[0], states[1], torch.arange(48))


def written(path: Path, snapshot: AnySnapshot, *, compress: bool = True) -> int:
    with FileIO(path, "w") as file:
        size = write_snapshot(file, snapshot, KEY, compress=compress)
    assert size == path.stat().st_size
    return size


def equal(one: AnySnapshot, two: AnySnapshot) -> bool:
    names = [list(s.tensors) for s in (one, two)]
    pairs = zip(one.tensors.values(), two.tensors.values(), strict=True)
    bits = (torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    return names[0] == names[1] and one.codec == two.codec and all(bits)


def test_without_the_package_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)  # an import of it fails
    install = r"pip install 'kvlink-rag\[zstd\]'"
    with pytest.raises(MissingExtra, match=install):
        SnapshotStore(tmp_path / "s", compress=True)
    with pytest.raises(MissingExtra, match=install):
        KVLinkRAG.open(tmp_path / "c", compression="zstd")
    with KVLinkRAG.open(tmp_path / "c") as rag:  # nothing was remembered
        assert rag.compression == "none"


@pytest.fixture(autouse=True)
def package(request: pytest.FixtureRequest) -> None:
    """All other tests need it."""
    if "without" not in request.node.name:
        pytest.importorskip("zstandard")


@pytest.mark.parametrize("codec", ["exact", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_of_each_codec(tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    snapshot = in_codec(compressible(dtype), codec)
    size = written(tmp_path / "f", snapshot)
    assert size <= snapshot_size(snapshot, KEY) == written(tmp_path / "p", snapshot, compress=False)
    ids = snapshot.token_ids.tolist()
    assert equal(read_snapshot(tmp_path / "f", key=KEY, token_ids=ids), snapshot)
    if codec == "exact" and dtype == torch.bfloat16:
        assert size < 0.9 * snapshot_size(snapshot, KEY)


def test_what_gains_nothing_or_too_much_is_written_plainly(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 2, 400, 32)
    for snapshot in (make_snapshot(1), Snapshot(zeros, zeros, torch.arange(400))):
        plain = snapshot_size(snapshot, KEY)
        assert written(tmp_path / "f", snapshot) == plain
        assert equal(read_snapshot(tmp_path / "f"), snapshot)


def test_every_damage_of_a_compressed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f"
    written(path, compressible())
    good = path.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 500)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(SnapshotCorrupt):
            read_snapshot(path, key=KEY)
    for other in (good[:-1], good + b"\0", good[: len(good) // 2]):
        path.write_bytes(other)
        with pytest.raises(SnapshotCorrupt):
            read_snapshot(path, key=KEY)


def forge(path: Path, frame: bytes, *, tokens: int = 48, **facts: str) -> None:
    """A file with a fitting checksum that says it holds compressed bf16 keys for `tokens`."""
    shape = (2, 2, tokens, 32)
    entries = [
        sealed._Entry("token_ids", "I64", (tokens,)),
        sealed._Entry("keys", "BF16", shape),
        sealed._Entry("values", "BF16", shape),
    ]
    facts = {"codec": "exact", "compression": "zstd", "stored": str(len(frame)), **facts}
    facts |= {"key": KEY, "format": KIND.format, "version": str(KIND.version)}
    checksum = _checksum(_header(entries, facts, "0" * 32), frame)
    path.write_bytes(_header(entries, facts, checksum) + frame)


SIZE = 48 * 8 + 2 * 2 * 2 * 2 * 48 * 32


def zstd(data: bytes, **options: int) -> bytes:
    return bytes(require_compression().ZstdCompressor(**options).compress(data))


def noise(count: int) -> bytes:
    generator = torch.Generator().manual_seed(1)
    return bytes(torch.randint(0, 64, (count,), generator=generator).tolist())


def test_forged_frames_are_refused_before_they_take_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    forge(path, zstd(noise(SIZE)))
    read_snapshot(path)  # what is forged below is all that is wrong with it
    bomb = zstd(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    cases = {
        # the header's shapes are what the frame holds: too much for its bytes
        "expected at least a 16th": lambda: forge(path, bomb, tokens=(1 << 28) // 520),
        "found a frame of more bytes": lambda: forge(path, zstd(noise(SIZE + 1))),
        f"found a frame of {SIZE - 1} bytes": lambda: forge(path, zstd(noise(SIZE - 1))),
        "cannot be decompressed": lambda: forge(path, noise(SIZE)),
        "found compression 'lzma'": lambda: forge(path, zstd(noise(SIZE)), compression="lzma"),
        "stored bytes, expected a number": lambda: forge(path, zstd(noise(SIZE)), stored="-1"),
        "bytes, expected": lambda: forge(path, zstd(noise(SIZE)), stored=str(SIZE)),
    }
    taken: list[int] = []
    empty = torch.empty

    def noted(*sizes: object, **options: object) -> torch.Tensor:
        taken.extend(n for n in sizes if isinstance(n, int))
        return empty(*sizes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "empty", noted)
    for message, make in cases.items():
        make()
        with pytest.raises(SnapshotCorrupt, match=message):
            read_snapshot(path)
    assert max(taken) < SIZE + 4096


def test_a_frame_with_a_huge_window_is_refused(tmp_path: Path) -> None:
    zstandard = require_compression()
    parameters = zstandard.ZstdCompressionParameters(window_log=26, write_content_size=0)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = noise(SIZE)
    forge(tmp_path / "f", frame.compress(data) + frame.flush())
    with pytest.raises(SnapshotCorrupt, match="cannot be decompressed"):
        read_snapshot(tmp_path / "f")


def test_a_store_reads_both_kinds_and_counts_what_is_stored(tmp_path: Path) -> None:
    snapshot = compressible()
    keys = ["aa" * 32, "bb" * 32]
    ids = snapshot.token_ids.tolist()
    plain = snapshot_size(snapshot, keys[0])
    with SnapshotStore(tmp_path / "s") as store:
        store.put(keys[0], snapshot)
    with SnapshotStore(tmp_path / "s", size_limit=math.ceil(2.5 * plain), compress=True) as store:
        store.put(keys[1], snapshot)
        assert all(
            equal(found, snapshot) for found in store.get_many(dict.fromkeys(keys, ids)).values()
        )
        assert plain < store.bytes() < 1.9 * plain
        on_disk = [path.stat().st_size for path in store.directory.glob("??/*")]
        assert store.bytes() == sum(on_disk)
        assert store.check() == []
    with SnapshotStore(tmp_path / "s") as store:  # read whatever the option
        assert equal(store.get(keys[1], ids), snapshot)


def test_a_collection_remembers_it_and_answers_the_same(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder
) -> None:
    model = make_model("llama", torch.bfloat16)
    documents = [Document(f"The harbour of {t} was built by hand. " * 4, id=t) for t in "abc"]
    answers, sizes, keys = [], [], []
    for compression in ("none", "zstd"):
        path = tmp_path / compression
        options = {"model": model, "embedder": embedder}
        with KVLinkRAG.open(path, compression=compression, **options) as rag:
            rag.add(documents)
        with KVLinkRAG.open(path, **options) as rag:
            assert rag.compression == compression
            answer = rag.ask("Where?", k=3, max_new_tokens=8)
            assert answer.trace.snapshots_found == 3
            answers.append(answer.text)
            sizes.append(rag.stats().snapshot_bytes)
            keys.append(set(rag.store.keys()))
            assert rag.check() == []
    assert answers[0] == answers[1]
    assert keys[0] == keys[1]  # it is no part of a snapshot's identity
    assert sizes[1] < 0.95 * sizes[0]
    with pytest.raises(ConfigError, match="found compression 'lzma', expected one of none, zstd"):
        KVLinkRAG.open(tmp_path / "zstd", compression="lzma")


def test_a_plan_knows_it_as_up_to(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder
) -> None:
    (tmp_path / "a.txt").write_text("The harbour of Orvale was built in 1911. " * 20)
    model = make_model("llama", torch.bfloat16)

    def opened(path: Path) -> KVLinkRAG:
        return KVLinkRAG.open(path, model=model, embedder=embedder, compression="zstd")

    files = find([str(tmp_path / "a.txt")], print)
    made = plan(files, opened, on_problem=print, seconds=0)
    assert made.compression == "zstd"
    shown = terminal.plan(made.to_dict())[1]
    assert shown.startswith("up to ")
    assert "snapshots up to " in shown
    assert "up to" not in terminal.plan(replace(made, compression="none").to_dict())[1]
