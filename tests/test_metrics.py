"""What is seen from outside: counters, Prometheus, one tree of loggers, a line for each fault."""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stress_faults import Heard
from trust import SNAPSHOT, as_documents, open_tiny

import kvlink_rag
import kvlink_rag.snapshots.encode
from kvlink_rag import KVLinkRAG
from kvlink_rag.collection.prometheus import CollectionMetrics
from kvlink_rag.errors import DeviceMemoryError, MissingExtra
from kvlink_rag.snapshots.file_format import read_snapshot

ROWS = [(f"id{n}", f"Town {n}", f"Town {n} has a harbour.") for n in range(4)]


@pytest.fixture
def rag(tmp_path: Path) -> Iterator[KVLinkRAG]:
    with open_tiny(tmp_path / "c") as rag:
        rag.add(as_documents(ROWS))
        yield rag


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, logger = Heard(), logging.getLogger("kvlink_rag")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def files(rag: KVLinkRAG) -> list[Path]:
    return sorted((rag.directory / "snapshots").rglob("*.safetensors"))


def test_counters(rag: KVLinkRAG) -> None:
    rag.ask("Town?", k=4, max_new_tokens=1)
    rag.ask("Town?", k=4, max_new_tokens=1)
    first = rag.stats()
    assert (first.hits, first.misses, first.corrupt, first.encoded) == (8, 0, 0, 0)
    assert first.prefix_hits > 0
    assert first.prefix_bytes > 0
    assert first.snapshot_bytes == sum(path.stat().st_size for path in files(rag))
    one, two = files(rag)[:2]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1] + b"?")
    rag.ask("Town?", k=4, max_new_tokens=1)
    then = rag.stats()
    assert (then.hits, then.misses, then.corrupt, then.encoded) == (10, 2, 1, 2)


def test_evictions_are_counted(tmp_path: Path) -> None:
    with open_tiny(tmp_path, size_limit=2 * SNAPSHOT) as rag:
        rows = [(f"{n}", "", "text " * 20 + str(n)) for n in range(8)]
        report = rag.add(as_documents(rows))
        assert report.deferred == 8 - report.encoded > 0
        assert rag.stats().evicted == 0
        rag.ask("text?", k=8, max_new_tokens=1)
        stats = rag.stats()
        assert stats.evicted == 8 - stats.snapshots > 0


def test_prometheus(rag: KVLinkRAG) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    registry.register(CollectionMetrics(rag, name="towns"))
    files(rag)[0].unlink()
    rag.ask("Town?", k=4, max_new_tokens=1)
    stats, label = rag.stats(), {"collection": "towns"}
    for name, value in {
        "kvlink_documents": 4,
        "kvlink_snapshots": 4,
        "kvlink_snapshot_bytes": stats.snapshot_bytes,
        "kvlink_hits_total": 3,
        "kvlink_misses_total": 1,
        "kvlink_encoded_total": 1,
        "kvlink_corrupt_total": 0,
        "kvlink_evicted_total": 0,
        "kvlink_prefix_hits_total": stats.prefix_hits,
    }.items():
        assert registry.get_sample_value(name, label) == value, name
    assert b'kvlink_documents{collection="towns"} 4.0' in client.generate_latest(registry)


def test_prometheus_is_an_extra(rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(MissingExtra, match=r"pip install 'kvlink-rag\[prometheus\]'"):
        CollectionMetrics(rag)


def test_one_tree_of_loggers() -> None:
    """Whoever sets a level or a handler on `kvlink_rag` has them all; a library prints nothing."""
    package = Path(kvlink_rag.__file__).parent
    people = {"cli", "commands", "terminal", "demo"}
    for path in (*package.glob("*.py"), *(package / "readers").glob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        said = {ast.unparse(call) for call in calls}
        if path.stem not in people:
            assert not [call for call in said if call.startswith(("print(", "logging.basicConfig"))]
            loggers = {call for call in said if "getLogger" in call}
            assert loggers <= {"logging.getLogger(__name__)"}, path


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("lost", "has lost its file"),
        ("cut", "is corrupt and is dropped"),
        ("flipped", "found checksum"),
        ("another version", "found format version"),
        ("unreadable", "cannot be read"),
    ],
)
def test_each_fault_of_a_snapshot_names_document_and_cause(
    rag: KVLinkRAG, heard: Heard, fault: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = rag.catalog.get(["id2"])[0].snapshot_key
    (path,) = [path for path in files(rag) if path.name.startswith(str(key))]
    data = path.read_bytes()
    if fault == "lost":
        path.unlink()
    elif fault == "unreadable":
        real = read_snapshot

        def read(found: Path, **arguments: Any) -> Any:
            if found == path:
                raise OSError(5, "Input/output error")
            return real(found, **arguments)

        monkeypatch.setattr("kvlink_rag.snapshots.store.store.read_snapshot", read)
    else:
        changed = {
            "cut": data[:-9],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "another version": data.replace(b'"version":"1"', b'"version":"9"'),
        }
        path.write_bytes(changed[fault])
    heard.lines.clear()
    rag.ask("Town?", k=4, max_new_tokens=1)
    assert any(cause in line and str(key) in line for line in heard.lines), heard.lines
    assert any("document 'id2'" in line and str(key) in line for line in heard.lines), heard.lines


def test_an_index_that_is_rebuilt_says_why(rag: KVLinkRAG, heard: Heard) -> None:
    rag.close()
    path = rag.directory / "index.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    with open_tiny(rag.directory) as again:
        assert len(again.search("Town 2", 1)) == 1
    assert any("the index is rebuilt" in line and "bytes, expected" in line for line in heard.lines)


# A GPU without memory, as torch tells it.


class Full:
    """Raises torch's error for the first `times` calls of more than `most` rows."""

    def __init__(self, real: Any, times: int, most: int = 0) -> None:
        self.real, self.times, self.most, self.calls = real, times, most, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times and len(args[-1]) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.real(*args, **kwargs)


def test_encoding_goes_on_with_smaller_batches(
    rag: KVLinkRAG, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [rag.model.passage_tokens(d) for d in rag.documents()]
    expected = dict(rag.model.encoder.many(passages))
    full = Full(kvlink_rag.snapshots.encode.encode_batch, times=99, most=1)
    monkeypatch.setattr(kvlink_rag.snapshots.encode, "encode_batch", full)
    found = dict(rag.model.encoder.many(passages))
    assert full.calls == 7  # 4, 2, 1, 1, 2, 1, 1
    assert found.keys() == expected.keys()
    for index, snapshot in found.items():
        assert torch.allclose(snapshot.keys, expected[index].keys, atol=1e-5)
    assert any("ran out of memory encoding 4 passages" in line for line in heard.lines)


def test_a_passage_that_does_not_fit_is_a_clear_error(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(kvlink_rag.snapshots.encode.encode_batch, times=99)
    with monkeypatch.context() as patch:
        patch.setattr(kvlink_rag.snapshots.encode, "encode_batch", full)
        with pytest.raises(DeviceMemoryError, match="encoding a passage of"):
            rag.add(as_documents([("new", "", "something new")]))
    assert rag.check(fix=True) == ["snapshots: document 'new' has none"]  # it is acknowledged
    assert len(rag) == 5
    assert rag.search("something new", 1)[0].document.id == "new"


@pytest.mark.parametrize("times", [1, 2])
def test_a_prompt_that_does_not_fit(
    rag: KVLinkRAG, heard: Heard, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Kept runs make room for it once; then it is an error, and the next question is answered."""
    expected = rag.ask("Town?", k=4, max_new_tokens=3).text
    kept = rag.stats().prefix_bytes
    full = Full(kvlink_rag.model.prompt_run.assemble, times, most=-1)
    monkeypatch.setattr(kvlink_rag.model.prompt_run, "assemble", full)
    if times == 2:
        with pytest.raises(DeviceMemoryError, match="ran out of memory for a prompt of"):
            rag.ask("Town?", k=4, max_new_tokens=3)
        assert rag.stats().prefix_bytes < kept
    assert rag.ask("Town?", k=4, max_new_tokens=3).text == expected
    assert any("kept runs are dropped" in line for line in heard.lines)
