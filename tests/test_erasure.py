"""What is deleted is on no disk any more: texts, titles, metadata, vectors, keys and values."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG, Passage, Text
from kvlink_rag.errors import CatalogError, StorageError

SECRET = Document(
    "The cellar key hangs behind the third barrel.", title="Zanzibar", id="secret-id",
    metadata={"owner": "Quillfeather"},
)  # fmt: skip
OTHERS = [Document(f"Tower {i} has {i} bells of bronze.", id=f"tower{i}") for i in range(20)]
WORDS = [b"third barrel", b"Zanzibar", b"Quillfeather", b"secret-id"]


@pytest.fixture
def rag(tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder) -> KVLinkRAG:
    with KVLinkRAG.open(tmp_path / "c", model=make_model("llama"), embedder=embedder) as rag:
        rag.add([*OTHERS[:10], SECRET, *OTHERS[10:]])
        rag.ask("Where is the key?", k=2, max_new_tokens=2)
        rag.save_index()
        yield rag


def traces(rag: KVLinkRAG, vector: np.ndarray, token_ids: bytes) -> list[str]:
    """What of the document stands in the files of the collection."""
    found = []
    for path in rag.directory.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            marks = [*WORDS, vector.tobytes(), token_ids]
            found += [f"{path.name}: {mark[:20]!r}" for mark in marks if mark in data]
    return found


def marks_of(rag: KVLinkRAG) -> tuple[np.ndarray, bytes]:
    vector = rag.vectors([SECRET.id])[0]
    return vector, np.array(rag.model.passage_tokens(SECRET), dtype="<i8").tobytes()


def test_deleting_leaves_nothing_in_the_files(rag: KVLinkRAG) -> None:
    vector, ids = marks_of(rag)
    assert len(traces(rag, vector, ids)) >= len(WORDS) + 2  # the catalog, the index, the snapshot
    rag.delete([SECRET.id])
    assert traces(rag, vector, ids) == []
    assert rag.check() == []
    rag.save_index()
    assert traces(rag, vector, ids) == []
    assert [hit.document.id for hit in rag.search("the third barrel", 30)].count(SECRET.id) == 0
    assert len(rag.index) == 20


def test_replacing_leaves_nothing_of_the_text_before(rag: KVLinkRAG) -> None:
    vector, ids = marks_of(rag)
    rag.add([Document("Nothing hangs there now.", id=SECRET.id)])
    left = traces(rag, vector, ids)
    assert left  # the id is the new one's too
    assert all("secret-id" in trace for trace in left)


def test_a_log_that_is_being_read_keeps_text_until_it_is_purged(rag: KVLinkRAG) -> None:
    reader = sqlite3.connect(rag.catalog.path)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM documents").fetchone()
    rag.add([Document("Another cellar, another key.", id="late")])
    rag.delete(["late"])
    log = Path(f"{rag.catalog.path}-wal")
    assert b"Another cellar" in log.read_bytes()
    reader.close()
    rag.delete([], now=True)
    assert not log.exists() or b"Another cellar" not in log.read_bytes()


def test_a_reader_that_stays_is_told(rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlink_rag.collection.catalog.connection._BUSY_SECONDS", 0.01)
    reader = sqlite3.connect(rag.catalog.path)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM documents").fetchone()
    rag.add([Document("Another cellar, another key.", id="late")])
    rag.parts.catalog.close()  # connections with the usual patience
    with pytest.raises(CatalogError, match="being read by another process"):
        rag.delete(["late"], now=True)
    reader.close()
    rag.delete([], now=True)


def test_snapshots_of_no_document_go_too(rag: KVLinkRAG) -> None:
    """One that a killed deletion left, or that was encoded for a passage handed over."""
    stray = Document("A passage of an application's own, never added.")
    list(rag.model.stream([Passage(stray), Text("what?")], reuse=rag.reuse, max_new_tokens=1))
    ids = rag.model.passage_tokens(stray)
    key = rag.snapshots.key(ids)
    assert key in rag.store
    assert any(key in problem for problem in rag.check())
    rag.delete([], now=True)
    assert key not in rag.store
    assert rag.check() == []


def test_a_kill_inside_leaves_no_snapshot_without_its_document(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(ids: object) -> None:
        raise KeyboardInterrupt

    vector, ids = marks_of(rag)
    with monkeypatch.context() as patch:
        patch.setattr(rag.catalog, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            rag.delete([SECRET.id])
    left = traces(rag, vector, ids)
    assert {trace.split(":")[0] for trace in left} == {"catalog.sqlite"}
    assert rag.ask("Where is the key?", k=1, max_new_tokens=2).hits  # and it still answers


def test_an_index_file_that_cannot_be_removed_is_told(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, **options: bool) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", full)
        with pytest.raises(StorageError, match="still holds the vectors"):
            rag.delete([SECRET.id])
    assert rag.get([SECRET.id])  # nothing was deleted, so it can be done again
    rag.delete([SECRET.id])
    assert rag.check() == []


def test_a_snapshot_that_another_document_shares_stays(rag: KVLinkRAG) -> None:
    twin = Document(SECRET.text, title=SECRET.title, id="twin")
    rag.add([twin])
    rag.delete([SECRET.id])
    assert rag.ask("Where is the key?", k=1, max_new_tokens=2).trace.snapshots_found == 1
