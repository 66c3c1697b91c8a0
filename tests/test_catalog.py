"""The catalog is the truth: what was acknowledged is there, whole, and nothing else is."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storage_workers as workers
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_workers import record

from kvlink_rag.collection.catalog import Catalog, Entry, Record, connection, writing
from kvlink_rag.documents import Document
from kvlink_rag.errors import CatalogError, DocumentError

STRIDE = 1 if os.environ.get("KVLINK_STRESS") else 21


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    with Catalog.open(tmp_path / "catalog.db", create=True) as opened:
        yield opened


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def ids(entries: list[Entry]) -> list[str]:
    return [entry.id for entry in entries]


def sql(catalog: Catalog, statement: str, *values: object) -> list[Any]:
    with sqlite3.connect(catalog.path) as connection:
        rows = connection.execute(statement, values).fetchall()
    connection.close()
    return rows


# Documents.


def test_upsert_get_delete(catalog: Catalog) -> None:
    done = catalog.upsert([record("a", "one"), record("b", "two two")])
    assert (done.added, done.replaced, done.unchanged) == (["a", "b"], [], [])
    first, second = catalog.get(["b", "missing", "a", "b"])
    assert (first.id, second.id) == ("b", "a")
    assert first.document == record("b", "two two").document
    assert first.document.metadata == {"n": 7}
    assert (first.snapshot_key, first.tokens, first.embedded) == (None, None, True)
    assert ids(catalog.by_rows([second.row, 999, first.row])) == ["a", "b"]
    assert catalog.count() == 2
    gone = catalog.delete(["b", "missing", "b"])
    assert gone == [first]
    assert catalog.delete(["b"]) == []
    assert ids(list(catalog.iterate())) == ["a"]
    assert catalog.count() == 1
    assert catalog.check() == []


def test_it_is_there_after_reopening(catalog: Catalog) -> None:
    catalog.upsert([record("a", "one")])
    before = catalog.get(["a"])
    catalog.close()
    with Catalog.open(catalog.path) as again:
        assert again.get(["a"]) == before
        assert again.identity == catalog.identity


def test_a_document_without_an_id_gets_its_own(catalog: Catalog) -> None:
    document = Document("text", title="t", metadata={"a": 1})
    done = catalog.upsert([Record(document)])
    assert done.added == [document.identified().id]


def test_unchanged_content_is_not_touched(catalog: Catalog) -> None:
    catalog.upsert([record("a", "one"), record("b", "two")])
    before, version = catalog.get(["a", "b"]), catalog.version()
    done = catalog.upsert([record("b", "two"), record("a", "one")])
    assert (done.added, done.replaced, done.unchanged) == ([], [], ["b", "a"])
    assert catalog.get(["a", "b"]) == before
    assert catalog.version() == version


@pytest.mark.parametrize("change", [{"text": "other"}, {"title": "other"}])
def test_changed_content_replaces_in_its_row(catalog: Catalog, change: dict[str, Any]) -> None:
    catalog.upsert([replace(record("a", "one"), snapshot_key="a" * 64, tokens=3)])
    (before,) = catalog.get(["a"])
    changed = Record(replace(before.document, **change))
    done = catalog.upsert([changed])
    assert done.replaced == [before]
    (after,) = catalog.get(["a"])
    assert after.document == changed.document
    assert after.row == before.row
    assert after.version > before.version
    # what was derived from the old content does not belong to the new
    assert (after.snapshot_key, after.tokens, after.embedded) == (None, None, False)


def test_an_embedding_stays_with_its_title_and_text(catalog: Catalog) -> None:
    catalog.upsert([replace(record("a", "one"), snapshot_key="a" * 64, tokens=3)])
    (before,) = catalog.get(["a"])
    vectors, version = catalog.changes_since(0).vectors, catalog.version()
    changed = Record(replace(before.document, metadata={"n": 3, "more": None}))
    assert catalog.upsert([changed]).replaced == [before]
    (after,) = catalog.get(["a"])
    assert after.document == changed.document
    assert (after.row, after.snapshot_key, after.embedded) == (before.row, None, True)
    assert catalog.changes_since(0).vectors.tolist() == vectors.tolist()
    assert catalog.changes_since(version).rows.tolist() == [after.row]
    catalog.upsert([replace(record("a", "one"), embedding=np.ones(3, dtype=np.float32))])
    assert catalog.changes_since(0).vectors.tolist() == [[1, 1, 1]]


def test_of_one_id_twice_the_last_counts(catalog: Catalog) -> None:
    done = catalog.upsert([record("a", "one"), record("a", "two")])
    assert (done.added, done.replaced) == (["a"], [])
    assert catalog.get(["a"])[0].document.text == "two"


def test_rows_are_never_used_again(catalog: Catalog) -> None:
    catalog.upsert([record("a", "one"), record("b", "two")])
    (gone,) = catalog.delete(["b"])
    catalog.upsert([record("b", "two")])
    assert catalog.get(["b"])[0].row > gone.row
    catalog.delete(["a", "b"])
    catalog.close()
    with Catalog.open(catalog.path) as again:
        again.upsert([record("c", "three")])
        assert again.get(["c"])[0].row > gone.row + 1


def test_many_at_once(catalog: Catalog) -> None:
    catalog.upsert([record(str(n), "x" * n) for n in range(1, 2001)])
    assert catalog.count() == 2000
    wanted = [str(n) for n in range(2000, 0, -1)]
    assert ids(catalog.get(wanted)) == wanted
    assert ids(list(catalog.iterate(batch=7))) == wanted[::-1]
    assert len(catalog.delete(wanted[:1500])) == 1500
    assert catalog.count() == 500


def test_iterating_beside_changes(catalog: Catalog) -> None:
    catalog.upsert([record(str(n), "x") for n in range(10)])
    seen = []
    for entry in catalog.iterate(batch=2):
        seen.append(entry.id)
        catalog.delete([entry.id])
    assert seen == [str(n) for n in range(10)]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | text
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(text.filter(bool), text, text, st.dictionaries(text, values, max_size=3))
def test_any_content_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, id: str, title: str, body: str, metadata: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.db"
    document = Document(body, title=title, id=id, metadata=metadata)
    with Catalog.open(path, create=True) as opened:
        opened.upsert([Record(document)])
        (entry,) = opened.get([id])
        assert entry.document == document
        assert json.dumps(entry.document.metadata) == json.dumps(metadata)  # 1 is not 1.0
        assert opened.upsert([Record(document)]).unchanged == [id]
        assert ids(opened.delete([id])) == [id]


@pytest.mark.parametrize(
    "body",
    ["\0", "a\0b\0", "\0" * 100, "\u202eabc", "e\u0301", "\U0010ffff", "' OR 1=1; --", "\r\n", ""],
)
def test_awkward_text_comes_back_exactly(catalog: Catalog, body: str) -> None:
    document = Document(body, title=body, id=body + "id", metadata={body: body})
    catalog.upsert([Record(document), Record(Document("other", id=(body + "id")[:-1] or "x"))])
    assert catalog.get([body + "id"])[0].document == document


def test_a_long_text_comes_back(catalog: Catalog) -> None:
    document = Document("ä\0" * 5_000_000, id="long")
    catalog.upsert([Record(document)])
    assert catalog.get(["long"])[0].document == document


@pytest.mark.parametrize(
    ("metadata", "match"), [({10: 1}, "key 10"), ({"n": (1, 2)}, r"\['n'\] is a tuple")]
)
def test_metadata_that_json_would_change_is_refused(
    catalog: Catalog, metadata: dict[str, object], match: str
) -> None:
    with pytest.raises(DocumentError, match=match):
        catalog.upsert([record("ok", "ok"), Record(Document("x", id="a", metadata=metadata))])
    assert catalog.count() == 0


@pytest.mark.parametrize("field", ["text", "title", "id"])
def test_a_lone_surrogate_is_refused_with_the_remedy(catalog: Catalog, field: str) -> None:
    fields = {"text": "t", "title": "t", "id": "i", field: "before \ud800 after"}
    with pytest.raises(DocumentError, match=r"lone surrogate in .*encode\('utf-8', 'replace'\)"):
        catalog.upsert([record("ok", "ok"), Record(Document(**fields))])
    assert catalog.count() == 0  # nothing of the batch


@pytest.mark.parametrize(
    "metadata", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}, {"a": 10**5000}]
)
def test_metadata_that_is_not_json_is_refused(catalog: Catalog, metadata: Any) -> None:
    with pytest.raises(DocumentError):
        catalog.upsert([Record(Document("x", id="a", metadata=metadata))])


@pytest.mark.parametrize(
    "embedding",
    [
        np.ones(3),
        np.ones((1, 3), dtype=np.float32),
        np.ones(0, dtype=np.float32),
        vector(np.nan, 1),
        vector(np.inf, 1),
    ],
)
def test_bad_embeddings_are_refused(catalog: Catalog, embedding: np.ndarray) -> None:
    with pytest.raises(DocumentError, match="found"):
        catalog.upsert([Record(Document("x", id="a"), embedding=embedding)])
    assert catalog.count() == 0


# Versions and changes.


def as_dict(changes: Any) -> dict[int, list[float]]:
    return dict(zip(changes.rows.tolist(), changes.vectors.tolist(), strict=True))


def test_changes_since(catalog: Catalog) -> None:
    nothing = catalog.changes_since(0)
    assert (nothing.version, len(nothing.rows), len(nothing.removed)) == (0, 0, 0)
    catalog.upsert([Record(Document("x", id=id), vector(n, n)) for n, id in enumerate("abc")])
    a, b, c = (entry.row for entry in catalog.get("abc"))
    first = catalog.changes_since(0)
    assert as_dict(first) == {a: [0, 0], b: [1, 1], c: [2, 2]}
    assert first.vectors.dtype == np.float32
    assert first.rows.dtype == first.removed.dtype == np.int64
    catalog.upsert([Record(Document("new", id="b"), vector(7, 7)), record("d", "no vector", 2)])
    catalog.delete(["a"])
    (d,) = (entry.row for entry in catalog.get("d"))
    second = catalog.changes_since(first.version)
    assert as_dict(second) == {b: [7, 7], d: [9, 9]}
    assert second.removed.tolist() == [a]
    assert second.version == catalog.version() > first.version
    assert len(catalog.changes_since(second.version).rows) == 0


def test_a_document_that_lost_its_embedding_leaves_the_index(catalog: Catalog) -> None:
    catalog.upsert([record("a", "one"), record("b", "one")])
    rows = [entry.row for entry in catalog.get(["a", "b"])]
    version = catalog.version()
    catalog.upsert([Record(Document("other", id="a"))])
    catalog.set_embeddings([(catalog.get(["b"])[0], None)])
    changes = catalog.changes_since(version)
    assert changes.removed.tolist() == rows
    assert catalog.embedded() == 0


def test_registered_first_embedded_later(catalog: Catalog) -> None:
    document = Document("x", id="a")
    catalog.upsert([Record(document, snapshot_key="a" * 64, tokens=4)])
    assert (catalog.count(), catalog.embedded()) == (1, 0)
    version = catalog.version()
    assert catalog.upsert([Record(document, vector(1, 2))]).unchanged == ["a"]
    changes = catalog.changes_since(version)
    assert list(as_dict(changes).values()) == [[1, 2]]
    entry = catalog.get(["a"])[0]
    assert (entry.snapshot_key, entry.tokens, entry.embedded) == ("a" * 64, 4, True)


def test_embeddings_are_set_only_where_the_content_is_the_same(catalog: Catalog) -> None:
    catalog.upsert([record("a", "one"), record("b", "one"), record("c", "one")])
    entries = catalog.get("abc")
    catalog.upsert([record("b", "other")])
    catalog.delete(["c"])
    version = catalog.version()
    assert catalog.set_embeddings([(entry, vector(8, 8, 8, 8)) for entry in entries]) == 1
    assert as_dict(catalog.changes_since(version)) == {entries[0].row: [8, 8, 8, 8]}


# A random history, and an index that follows it by changes alone.
history = st.lists(
    st.tuples(
        st.sampled_from(["upsert", "delete", "sync"]),
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=4),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=25)
@given(history)
def test_an_index_that_follows_the_changes_is_always_right(
    tmp_path_factory: pytest.TempPathFactory, history: Any
) -> None:
    directory = tmp_path_factory.mktemp("history")
    expected: dict[str, int] = {}
    index: dict[int, list[float]] = {}
    version = 0
    with Catalog.open(directory / "c.db", create=True) as opened:
        for what, items in [*history, ("sync", [])]:
            if what == "upsert":
                opened.upsert([Record(Document(str(n), id=id), vector(n)) for id, n in items])
                expected.update(items)
            elif what == "delete":
                opened.delete([id for id, _ in items])
                expected = {k: v for k, v in expected.items() if k not in dict(items)}
            else:
                changes = opened.changes_since(version)
                assert not set(changes.rows.tolist()) & set(changes.removed.tolist())
                for row in changes.removed.tolist():
                    index.pop(row, None)
                index.update(as_dict(changes))
                version = changes.version
                entries = {e.id: e.row for e in opened.iterate()}
                assert entries.keys() == expected.keys()
                assert index == {entries[id]: [float(n)] for id, n in expected.items()}


# Snapshots and settings.


def test_snapshot_users(catalog: Catalog) -> None:
    catalog.upsert([record(id, "same text") for id in "abc"])
    entries, version = catalog.get("abc"), catalog.version()
    catalog.upsert([record("c", "other text")])
    assert catalog.set_snapshots([(entry, "a" * 64, 9) for entry in entries]) == 2
    assert catalog.snapshot_users("a" * 64) == 2
    assert catalog.snapshot_users("x" * 64) == 0
    assert [(e.snapshot_key, e.tokens) for e in catalog.get("ac")] == [("a" * 64, 9), (None, None)]
    catalog.delete(["a"])
    assert catalog.snapshot_users("a" * 64) == 1
    assert catalog.set_snapshots([(catalog.get("b")[0], None, None)]) == 1
    assert catalog.snapshot_users("a" * 64) == 0
    assert catalog.set_snapshots([]) == 0
    changed = catalog.changes_since(version)
    assert changed.rows.tolist() == [entries[2].row]  # the index does not depend on snapshots


def test_settings_are_remembered(catalog: Catalog) -> None:
    assert catalog.settings() == {}
    catalog.set_settings({"model": "a/b", "dimension": 768, "none": None, "deep": {"ä": [1.5]}})
    catalog.set_setting("model", "c/d")
    catalog.close()
    with Catalog.open(catalog.path) as again:
        assert again.settings() == {
            "deep": {"ä": [1.5]},
            "dimension": 768,
            "model": "c/d",
            "none": None,
        }
        assert again.version() == 0  # settings are no change to documents


# Opening.


def test_a_missing_catalog_is_not_made_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="found no catalog"):
        Catalog.open(tmp_path / "catalog.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["deleted", "emptied", "only the log"])
def test_a_lost_catalog_is_never_silently_empty(tmp_path: Path, lost: str) -> None:
    path = tmp_path / "catalog.db"
    Catalog.open(path, create=True, siblings=("store",)).close()
    (tmp_path / "store").mkdir()
    Catalog.open(path, create=True, siblings=("store",)).close()
    path.unlink()
    if lost == "emptied":
        path.touch()
    if lost == "only the log":
        (tmp_path / "store").rmdir()
        (tmp_path / "catalog.db-wal").touch()
    with pytest.raises(CatalogError, match=r"so it was lost; bring the file back"):
        Catalog.open(path, create=True, siblings=("store", "index"))


def test_only_the_owner_can_read(catalog: Catalog) -> None:
    catalog.upsert([record("a", "one")])
    for path in catalog.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


CHANGES: dict[str, Callable[[Catalog, Entry], object]] = {
    "upsert": lambda catalog, entry: catalog.upsert([record("b", "two"), record("a", "one")]),
    "delete": lambda catalog, entry: catalog.delete(["a"]),
    "set_snapshots": lambda catalog, entry: catalog.set_snapshots([(entry, "0" * 64, 3)]),
    "set_embeddings": lambda catalog, entry: catalog.set_embeddings([(entry, None)]),
    "set_settings": lambda catalog, entry: catalog.set_settings({"k": 1}),
    "set_first": lambda catalog, entry: catalog.set_first({"k": 1}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("reopened", [False, True])
def test_every_change_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reopened: bool
) -> None:
    """The connections that change the catalog say so themselves, as they commit."""
    commits = watch_commits(monkeypatch)
    catalog = Catalog.open(tmp_path / "catalog.db", create=True)
    catalog.upsert([record("a", "text")])
    (entry,) = catalog.get(["a"])
    if reopened:
        catalog.close()
        catalog = Catalog.open(tmp_path / "catalog.db")
    commits.clear()
    CHANGES[name](catalog, entry)
    catalog.close()
    full = {"journal_mode": "wal", "synchronous": 2, "trusted_schema": 0}
    assert [found for found, changed in commits if changed] == [full]


def test_deleted_text_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own wish: this SQLite may be one that does so anyway."""
    connect = sqlite3.connect

    def otherwise_built(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", otherwise_built)
    with Catalog.open(tmp_path / "catalog.db", create=True) as catalog:
        catalog.upsert([record(f"{n}", f"secret {n}") for n in range(200)])
        catalog.upsert([record("0", "harmless")])
        catalog.delete([f"{n}" for n in range(1, 200)])
        for path in tmp_path.iterdir():
            assert b"secret" not in path.read_bytes(), path


def watch_commits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], bool]]:
    """At each COMMIT from now on: how the connection is set, and whether it has changed rows."""
    commits: list[tuple[dict[str, Any], bool]] = []

    class Watched(sqlite3.Connection):
        before = 0

        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement == "COMMIT":
                names = ("journal_mode", "synchronous", "trusted_schema")
                found = {
                    n: super(Watched, self).execute(f"PRAGMA {n}").fetchone()[0] for n in names
                }
                commits.append((found, self.total_changes > self.before))
                self.before = self.total_changes
            return super().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
    return commits


def test_other_schema_versions_are_named(catalog: Catalog) -> None:
    catalog.close()
    sql(catalog, "PRAGMA user_version = 9")
    with pytest.raises(CatalogError, match="schema version 9, expected 1"):
        Catalog.open(catalog.path)


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA application_id = 5",
        "CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM documents; END",
        "CREATE VIEW v AS SELECT 1",
        "DROP INDEX documents_version",
        "ALTER TABLE documents ADD COLUMN more",
    ],
)
def test_an_altered_schema_is_refused(catalog: Catalog, statement: str) -> None:
    catalog.close()
    sql(catalog, statement)
    with pytest.raises(CatalogError, match=r"not a catalog|damaged"):
        Catalog.open(catalog.path, create=True)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(CatalogError, match="cannot be used"):
        Catalog.open(path, create=True)
    assert path.read_bytes() == b"not a database" * 1000
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE mine (a)")
    connection.close()
    with pytest.raises(CatalogError, match="not a catalog"):
        Catalog.open(tmp_path / "other.db", create=True)
    with pytest.raises(CatalogError):
        Catalog.open(tmp_path, create=True)
    with pytest.raises(CatalogError):
        Catalog.open(tmp_path / "missing" / "catalog.db", create=True)


# Damage.


def test_damaged_bytes_are_an_error_never_other_content(tmp_path: Path) -> None:
    path = tmp_path / "good.db"
    documents = {f"id{n}": f"text {n} " * 40 for n in range(12)}
    with Catalog.open(path, create=True) as opened:
        opened.upsert([record(id, body) for id, body in documents.items()])
        expected = as_dict(opened.changes_since(0))
    good, chance = path.read_bytes(), random.Random(5)
    refused = 0
    for case in range(60):
        bad = bytearray(good)
        if case % 6 == 0:
            del bad[chance.randrange(len(bad)) :]
        for _ in range(chance.choice([1, 1, 1, 30])):
            if bad:
                bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        damaged = tmp_path / f"{case}.db"
        damaged.write_bytes(bad)
        try:
            with Catalog.open(damaged) as opened:
                for entry in opened.iterate():
                    assert entry.document == record(entry.id, documents[entry.id]).document
                found = as_dict(opened.changes_since(0))
                assert all(found[row] == expected[row] for row in found)
        except CatalogError:
            refused += 1
    assert refused > 20


def test_check_names_damaged_documents(catalog: Catalog) -> None:
    catalog.upsert([record(id, "text") for id in "abc"])
    sql(catalog, "UPDATE documents SET text = 'texT' WHERE id = 'b'")
    with pytest.raises(CatalogError, match=r"document 'b' .* damaged"):
        catalog.get(["b"])
    assert ids(catalog.get(["a", "c"])) == ["a", "c"]
    assert len(catalog.check(fix=True)) == 1
    assert len(catalog.check()) == 1  # text cannot be made again
    assert len(catalog.delete(["b"])) == 1
    catalog.upsert([record("b", "text")])
    assert catalog.check() == []


@pytest.mark.parametrize("column", ["title", "metadata", "id"])
def test_every_part_of_the_content_is_covered(catalog: Catalog, column: str) -> None:
    catalog.upsert([record("a", "text")])
    sql(catalog, f"UPDATE documents SET {column} = '{{}}'")
    with pytest.raises(CatalogError, match="damaged"):
        list(catalog.iterate())


def test_check_drops_damaged_embeddings(catalog: Catalog) -> None:
    catalog.upsert([record("a", "text"), record("b", "text")])
    blob = sql(catalog, "SELECT embedding FROM documents WHERE id = 'b'")[0][0]
    for bad in (b"\xff" + blob[1:], blob[:-1], blob[:8], b"", blob[:-1] + b"\0"):
        sql(catalog, "UPDATE documents SET embedding = ? WHERE id = 'b'", bad)
        with pytest.raises(CatalogError, match="embedding of row 2 is damaged"):
            catalog.changes_since(0)
        version = catalog.version()
        assert catalog.check() == ["damaged embedding: row 2"]
        assert catalog.check(fix=True) == ["damaged embedding: row 2"]
        assert catalog.check() == []
        assert catalog.changes_since(version).removed.tolist() == [2]


def test_check_rebuilds_a_damaged_index_of_sqlite(catalog: Catalog) -> None:
    catalog.upsert([record(id, "text") for id in "abc"])
    catalog.close()
    with sqlite3.connect(catalog.path) as connection:  # an index that lacks a row
        connection.execute("PRAGMA writable_schema = 1")
        (sql_text,) = connection.execute(
            "SELECT sql FROM sqlite_master WHERE name = 'documents_version'"
        ).fetchone()
        connection.execute(
            "UPDATE sqlite_master SET sql = sql || ' WHERE id > ''b''' "
            "WHERE name = 'documents_version'"
        )
    connection.close()
    with sqlite3.connect(catalog.path) as connection:
        connection.execute("REINDEX documents_version")
        connection.execute("PRAGMA writable_schema = 1")
        connection.execute(
            "UPDATE sqlite_master SET sql = ? WHERE name = 'documents_version'", (sql_text,)
        )
    connection.close()
    with Catalog.open(catalog.path) as damaged:
        assert any("documents_version" in line for line in damaged.check())
        damaged.check(fix=True)
        assert damaged.check() == []
        assert len(damaged.changes_since(0).rows) == 3


def test_a_failed_change_leaves_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.upsert([record("a", "one")])
    before, calls = catalog.changes_since(0), itertools.count()
    original = writing._insert

    def fail(*args: Any) -> None:
        if next(calls) == 2:
            raise sqlite3.OperationalError("database or disk is full")
        original(*args)

    monkeypatch.setattr(writing, "_insert", fail)
    with pytest.raises(CatalogError, match="disk is full"):
        catalog.upsert([record("a", "changed"), *(record(str(n), "x") for n in range(5))])
    monkeypatch.undo()
    assert ids(list(catalog.iterate())) == ["a"]
    assert catalog.get(["a"])[0].document.text == "one"
    assert catalog.version() == before.version
    assert catalog.check() == []


def test_at_rest_the_catalog_is_one_file(catalog: Catalog) -> None:
    """Copying the file alone, while nobody writes, is a backup."""
    catalog.upsert([record(id, "text") for id in "abc"])
    catalog.delete(["a"])
    copy = catalog.path.with_name("copy.db")
    shutil.copy(catalog.path, copy)
    with Catalog.open(copy) as restored:
        assert ids(list(restored.iterate())) == ["b", "c"]


# Crashes and company.


def test_a_kill_at_any_line_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    states = [
        {},
        {"a": "first", "b": "first"},
        {"a": "second one", "b": "first", "c": "second one"},
        {"a": "second one"},
    ]
    seen = set()
    for line in itertools.count(1, STRIDE):
        directory = tmp_path / str(line)
        directory.mkdir()
        path, note = directory / "catalog.db", directory / "acknowledged"
        code = workers.run("kill_at", line, "change_catalog", str(path), str(note))
        acknowledged = int(note.read_text() or 0) if note.exists() else 0
        with Catalog.open(path) as opened:
            found = {entry.id: entry.document.text for entry in opened.iterate()}
            assert found in states[acknowledged : acknowledged + 2]
            assert opened.check() == []
            assert len(opened.changes_since(0).rows) == len(found)
            opened.upsert([record("after", "x")])
        seen.add(acknowledged)
        shutil.rmtree(directory)
        if code == 0:
            break
        assert code == workers.KILLED
    assert seen == {0, 1, 2, 3}


def test_a_kill_while_creating(tmp_path: Path) -> None:
    for line in itertools.count(1, STRIDE // 5 + 1):
        path = tmp_path / str(line) / "catalog.db"
        path.parent.mkdir()
        code = workers.run("kill_at", line, "open_catalog", str(path))
        (path.parent / "store").mkdir()  # comes after the catalog
        if not path.exists():
            (path.parent / "store").rmdir()
        with Catalog.open(path, create=True, siblings=("store",)) as opened:
            opened.upsert([record("after", "x")])
            assert opened.check() == []
        assert not list(path.parent.glob("*.tmp*"))  # leftovers are swept
        if code == 0:
            break


def test_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    started = [workers.start("add_documents", str(path), name, 10) for name in "abc"]
    assert [workers.join(process) for process in started] == [0, 0, 0]
    with Catalog.open(path) as opened:
        assert opened.count() == 30
        versions = [entry.version for entry in opened.iterate()]
        assert len(versions) == 30
        assert versions == sorted(set(versions))  # one number a change
        assert opened.version() == versions[-1]
        assert opened.check() == []


def test_another_process_sees_the_change(tmp_path: Path, catalog: Catalog) -> None:
    before = catalog.version()
    assert workers.run("add_documents", str(catalog.path), "x", 1) == 0
    assert catalog.version() > before
    assert ids(list(catalog.iterate())) == ["x0"]


def test_threads_share_one_catalog(catalog: Catalog) -> None:
    wrong = []

    def load(name: str) -> None:
        try:
            for number in range(8):
                catalog.upsert([record(f"{name}{number}", "x")])
                assert len(catalog.get([f"{name}{number}"])) == 1
                list(catalog.iterate(batch=3))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=load, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert catalog.count() == 64


def test_connections_are_bounded(catalog: Catalog) -> None:
    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=catalog.count) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before + 3 * 4
    catalog.close()


def test_on_a_full_disk_the_file_alone_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `test_reliability` has it on a real one: SQLite finds no room for its shared memory."""
    path = tmp_path / "catalog.db"
    with Catalog.open(path, create=True) as catalog:
        catalog.upsert([record("a", "text")])
    connected, full = connection._connected, [True]

    def without_room(uri: str, pragmas: Sequence[str]) -> sqlite3.Connection:
        if "mode=rw" in uri:
            raise sqlite3.OperationalError("database or disk is full")
        return connected(uri, pragmas)

    monkeypatch.setattr(connection, "_connected", without_room)
    monkeypatch.setattr(connection.atomic_files, "is_full", lambda directory: full[0])
    with Catalog.open(path) as catalog:
        assert [entry.id for entry in catalog.iterate()] == ["a"]
        with pytest.raises(CatalogError, match="disk is full"):
            catalog.upsert([record("b", "more")])
        path.with_name("catalog.db-wal").write_bytes(b"changes of somebody")
        with pytest.raises(CatalogError, match="holds changes"):
            catalog.count()
        path.with_name("catalog.db-wal").unlink()
        full[0] = False
        with pytest.raises(CatalogError, match="disk is full"):
            catalog.count()
