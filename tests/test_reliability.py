"""A collection as a whole under damage, restored backups, other processes and planted links."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import storage_workers
import trust
from stress_crash import ended, fork
from trust import as_documents, open_tiny

from kvlink_rag import Document, KVLinkRAG, Text
from kvlink_rag.errors import CatalogError, SettingsMismatch, StorageError

ROWS = [(name.lower(), name, f"{name} has a harbour and {n} mills.") for n, name in
        enumerate(trust.NAMES)]  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A collection of ten documents, closed."""
    with open_tiny(tmp_path / "c") as rag:
        rag.add(as_documents(ROWS))
    return tmp_path / "c"


def change_catalog(directory: Path, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(directory / "catalog.sqlite")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


# Damage in the truth itself.


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("text", "other text"),
        ("text", b"bytes"),
        ("title", "other"),
        ("metadata", "{"),
        ("text", None),
    ],
)
def test_a_damaged_document_is_named_and_alone(directory: Path, column: str, value: Any) -> None:
    """It can be deleted or added again, as its error says, and everything else goes on."""
    if value is None:  # a flipped bit that makes it no UTF-8
        change_catalog(directory, "UPDATE documents SET text = CAST(X'ff41' AS TEXT) WHERE row = 8")
    else:
        change_catalog(directory, f"UPDATE documents SET {column} = ? WHERE row = 8", value)
    with open_tiny(directory) as rag:
        (problem,) = rag.check()
        assert "'hux' (row 8) is damaged" in problem
        assert rag.check(fix=True) == [problem]
        assert rag.stats().snapshots == 10
        with pytest.raises(CatalogError, match="delete it and add it again"):
            rag.ask("Hux?", k=10, max_new_tokens=1)
        assert rag.get(["velt"])[0].text == ROWS[6][2]
        if column == "text":
            assert rag.delete(["hux"]) == 1
        rag.add(as_documents(ROWS[7:8]))
        assert trust.held(rag)["hux"] == ("Hux", ROWS[7][2])
        assert rag.check() == []
        assert rag.ask("Hux?", k=10, max_new_tokens=1).hits[0].document.id == "hux"


def test_a_damaged_embedding_is_told_by_check_and_made_again(directory: Path) -> None:
    blob = "zeroblob(length(embedding))"
    change_catalog(directory, f"UPDATE documents SET embedding = {blob} WHERE row = 3")
    with open_tiny(directory) as rag:
        assert rag.check() == ["catalog: damaged embedding: row 3"]
        rag.check(fix=True)
        assert rag.check() == []
        assert rag.search("Teldon", 1)[0].document.id == "teldon"


# A catalog that goes away, or comes back from a backup.


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_catalog_that_goes_away_while_open(directory: Path, how: str) -> None:
    """Its connections would go on writing to a file that nobody finds again."""
    with open_tiny(directory) as rag:
        assert len(rag) == 10
        copy = shutil.copy(directory / "catalog.sqlite", directory / "copy")
        for path in directory.glob("catalog.sqlite*"):
            path.unlink()
        if how == "replaced":
            os.rename(copy, directory / "catalog.sqlite")
        for action in (
            lambda: rag.add([Document("new", id="new")]),
            lambda: rag.ask("Hux?"),
            lambda: len(rag),
        ):
            with pytest.raises(CatalogError, match="removed or replaced while it was open"):
                action()
    if how == "replaced":
        with open_tiny(directory) as rag:
            assert len(rag) == 10
            assert rag.check() == []


def test_an_index_of_another_history_is_not_used(directory: Path, tmp_path: Path) -> None:
    """Both histories have made as many changes; only one of them led to the index."""
    shutil.copy(directory / "catalog.sqlite", tmp_path / "backup")
    with open_tiny(directory) as rag:
        rag.add([Document("alpha alpha alpha", id="alpha")])
    shutil.copy(tmp_path / "backup", directory / "catalog.sqlite")
    with open_tiny(directory) as rag:
        rag.add([Document("beta beta beta", id="beta")])  # before the index file is looked at
        assert rag.search("beta", 1)[0].document.id == "beta"
        assert rag.search("beta", 1)[0].score == pytest.approx(1)


def test_an_older_index_of_this_history_is_caught_up(directory: Path, tmp_path: Path) -> None:
    with open_tiny(directory) as rag:
        shutil.copy(directory / "index.faiss", tmp_path / "older")
        rag.add([Document("alpha alpha alpha", id="alpha")])
        rag.delete(["hux"])
    shutil.copy(tmp_path / "older", directory / "index.faiss")
    with open_tiny(directory) as rag:
        assert rag.search("alpha", 1)[0].document.id == "alpha"
        assert {hit.document.id for hit in rag.search("Hux", 20)} == set(trust.held(rag))


def test_check_compares_the_index_with_the_catalog(directory: Path) -> None:
    """A file with a sound checksum and the wrong vectors, as a defect of ours would leave it."""
    with open_tiny(directory) as rag:
        index = rag.index
        index.add([2], index.vectors([5]))
        rag.save_index()
        assert rag.check() == ["index: found other vectors than the catalog's"]
    with open_tiny(directory) as rag:
        assert rag.check(fix=True) == ["index: found other vectors than the catalog's"]
        assert rag.check() == []
        assert rag.search("Marnik", 1)[0].document.id == "marnik"


def test_check_removes_what_a_killed_save_left(directory: Path) -> None:
    leftover = directory / "index.faiss.0123456789abcdef.tmp"
    leftover.write_bytes(b"half an index")
    with open_tiny(directory) as rag:
        assert rag.check() == [f"index: leftover temporary file: {leftover.name}"]
        assert leftover.exists()
        rag.check(fix=True)
        assert not leftover.exists()
        assert rag.check() == []


# Other processes that take another model or embedder.


def test_two_embedders_at_once_are_not_mixed(tmp_path: Path) -> None:
    """Both opened before anything was embedded, so neither knew of the other."""
    with open_tiny(tmp_path) as one, open_tiny(tmp_path, salt="salt") as two:
        one.add(as_documents(ROWS[:2]))
        with pytest.raises(SettingsMismatch, match="embedder"):
            two.add(as_documents(ROWS[2:4]))
        with pytest.raises(SettingsMismatch, match="embedder"):
            two.search("Hux")
        assert len(one) == 2


def test_two_models_at_once_are_not_mixed(tmp_path: Path) -> None:
    with open_tiny(tmp_path) as one, open_tiny(tmp_path, seed=1) as two:
        one.add(as_documents(ROWS[:2]))
        with pytest.raises(SettingsMismatch, match="model"):
            two.add(as_documents(ROWS[2:4]))


def test_a_collection_encoded_again_elsewhere_is_not_mixed(directory: Path) -> None:
    with open_tiny(directory) as stale:
        stale.add(as_documents(ROWS))
        open_tiny(directory, seed=1, salt="salt", reencode=True).close()
        with pytest.raises(SettingsMismatch, match="model"):
            stale.add([Document("new", id="new")])
        with pytest.raises(SettingsMismatch, match="embedder"):
            stale.search("Hux")
    with open_tiny(directory, seed=1, salt="salt") as rag:
        assert rag.check() == []


# Who may read, and where links lead.


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with open_tiny(tmp_path / "c") as rag:
            rag.add(as_documents(ROWS[:2]))
            rag.save_index()
            modes = {path: path.stat().st_mode & 0o777 for path in [tmp_path / "c", *walk(rag)]}
    finally:
        os.umask(before)
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if not path.is_dir()} == {0o600}
    assert len(modes) > 10


def walk(rag: KVLinkRAG) -> list[Path]:
    return list(rag.directory.rglob("*"))


LINKS = [
    "write.lock", "index.faiss", "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm",
    "catalog.sqlite-journal", "snapshots", "snapshots/cache.db", "snapshots/cache.db-wal",
    "snapshots/cache.db-shm", "snapshots/cache.db-journal", "snapshots/lock", "snapshots/tmp",
]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_planted_links_are_refused(directory: Path, tmp_path: Path, name: str) -> None:
    """An archive of a collection may hold links; nothing they lead to is read, written or lost."""
    path, outside = directory / name, tmp_path / "outside"
    if path.is_dir():
        shutil.copytree(path, outside)
        (outside / "precious").write_text("precious")
        shutil.rmtree(path)
    elif path.exists():
        path.rename(outside)
    else:
        outside.write_bytes(b"precious" * 1000)
    before = contents(outside)
    path.symlink_to(outside)
    with pytest.raises(StorageError):
        open_tiny(directory)
    assert contents(outside) == before


def contents(path: Path) -> dict[str, bytes]:
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return {str(p): p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_can_write(directory: Path) -> None:
    """A server that forks its workers after opening the collection."""
    with open_tiny(directory) as rag:
        rag.add([Document("before", id="before")])

        def work() -> None:
            rag.add([Document("forked", id="forked")])
            assert rag.ask("forked?", k=2, max_new_tokens=1).hits[0].document.id == "forked"

        assert ended(fork(work)) == 0
        assert rag.get(["forked"])[0].text == "forked"
        rag.add([Document("after", id="after")])
        assert rag.check() == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_read_only_collection_answers(directory: Path) -> None:
    """On a file system that nobody can write to: questions, searches and checks, no changes."""
    lost = next((directory / "snapshots").rglob("*.safetensors"))
    lost.unlink()

    def work() -> None:
        storage_workers._mount("--bind", str(directory), str(directory))
        storage_workers._mount("-o", "remount,bind,ro", str(directory))
        with open_tiny(directory) as rag:
            assert trust.wrong_answers(rag, random.Random(0), 3) == []
            assert rag.ask("harbour?", k=10, max_new_tokens=1).trace.snapshots_encoded == 1
            assert rag.search("Hux", 1)[0].document.id == "hux"
            missing, without = rag.check()
            assert lost.name in missing
            assert "has none" in without
            for change in (
                lambda: rag.add([Document("new", id="new")]),
                lambda: rag.delete(["hux"]),
                lambda: rag.check(fix=True),
            ):
                with pytest.raises(StorageError, match=r"[Rr]ead-only"):
                    change()

    code = ended(fork(work))
    if code == storage_workers.SKIPPED:
        pytest.skip("mounting is not allowed here")
    assert code == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_closed_collection_on_a_full_disk_answers(directory: Path, tmp_path: Path) -> None:
    """No byte is free, not even for SQLite's shared memory: it is read; room, and it is written."""
    place = tmp_path / "disk"
    place.mkdir()
    lost = next((directory / "snapshots").rglob("*.safetensors"))
    lost.unlink()

    def work() -> None:
        storage_workers._mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place))
        shutil.copytree(directory, place / "c")
        fill(place / "filler")
        with open_tiny(place / "c") as rag:
            assert {document.id for document in rag.documents()} >= {"hux"}
            assert trust.wrong_answers(rag, random.Random(0), 3) == []
            assert rag.ask("harbour?", k=10, max_new_tokens=1).trace.snapshots_encoded == 1
            assert rag.search("Hux", 1)[0].document.id == "hux"
            assert rag.stats().documents == 10
            with pytest.raises(StorageError):
                rag.add([Document("new", id="new")])
            (place / "filler").unlink()
            rag.add([Document("new", id="new")])
            assert rag.get(["new"])[0].text == "new"
            assert rag.ask("harbour?", k=10, max_new_tokens=1).trace.snapshots_encoded == 1
            assert rag.ask("harbour?", k=10, max_new_tokens=1).trace.snapshots_encoded == 0
            assert rag.check() == []

    code = ended(fork(work))
    if code == storage_workers.SKIPPED:
        pytest.skip("mounting is not allowed here")
    assert code == 0


def fill(path: Path) -> None:
    """Take all room that is left on the disk, to the last byte."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_encode_the_same_passages(directory: Path) -> None:
    """Once, or harmlessly twice: each answer is right, and one snapshot a passage stays."""
    for path in (directory / "snapshots").rglob("*.safetensors"):
        path.unlink()
    start = multiprocessing.get_context("fork").Barrier(3)

    def work() -> None:
        with open_tiny(directory) as rag:
            rag.model.prefill([Text("ready?")])
            start.wait(600)  # side by side from here on
            answer = rag.ask("harbour?", k=10, max_new_tokens=4)
            parts = rag.model.prompt([hit.document for hit in answer.hits], "harbour?")
            assert answer.text == rag.model.generate(parts, mode="masked", max_new_tokens=4)

    assert [ended(child) for child in [fork(work) for _ in range(3)]] == [0, 0, 0]
    with open_tiny(directory) as rag:
        assert rag.check() == []
        assert rag.stats().snapshots == 10
        assert trust.leaks(rag) == []


def test_a_catalog_whose_rows_are_out_of_order_ends(directory: Path) -> None:
    """Found by the fault stress: reading page by page went round in a damaged tree for ever."""
    path = directory / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096]
        count = int.from_bytes(page[3:5], "big")
        if page[0] == 0x0D and count > 2 and b"has a harbour" in page:  # a leaf of `documents`
            cells = [page[at : at + 2] for at in range(8, 8 + 2 * count, 2)]
            data[start + 8 : start + 8 + 2 * count] = b"".join(reversed(cells))
    path.write_bytes(data)
    with open_tiny(directory) as rag:
        with pytest.raises(CatalogError, match="not in order"):
            list(rag.documents())
        for fix in (False, True):
            problems = "\n".join(rag.check(fix=fix))
            assert "damaged database" in problems
            assert "not in order" in problems
