"""What is asked of a catalog: documents, versions, changes and settings. Changes nothing.

Each function is one read transaction, but for those that read in batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from kvlink_rag.errors import CatalogError

from .connection import Database, Sql, integer
from .records import COLUMNS, Changes, Entry, Row, changes, entries, sound_key

_AT_ONCE = 500  # values in one IN (...)
_VERSION = "SELECT version FROM state"
INDEX_VERSION = "index_version"  # the setting: of the index saved last

# Documents.


def by_ids(database: Database, ids: Iterable[str], skip_damaged: bool) -> list[Entry]:
    """The entries of `ids`, in that order; unknown ids are left out."""
    wanted = list(dict.fromkeys(ids))
    found = {row[1]: row for row in database.read(lambda sql: select(sql, "id", wanted))}
    return entries((found[id] for id in wanted if id in found), skip_damaged)


def by_rows(database: Database, rows: Iterable[int]) -> list[Entry]:
    """The entries of `rows`, in that order; rows that are gone are left out."""
    wanted = _numbers(rows)
    found = {row[0]: row for row in database.read(lambda sql: select(sql, "row", wanted))}
    return entries(found[row] for row in wanted if row in found)


def missing(database: Database, ids: Iterable[str]) -> list[str]:
    """Those of `ids` that the catalog does not hold; a damaged document is held."""
    wanted = list(dict.fromkeys(ids))
    found = {row[1] for row in database.read(lambda sql: select(sql, "id", wanted))}
    return [id for id in wanted if id not in found]


def texts(database: Database, rows: Iterable[int]) -> Iterator[tuple[int, str, str, str]]:
    """Row, id, title and text of those `rows` that are there; contents are not verified."""
    wanted, columns = _numbers(rows), "row, id, title, text"
    for start in range(0, len(wanted), _AT_ONCE):
        part = wanted[start : start + _AT_ONCE]
        yield from database.read(partial(select, column="row", values=part, columns=columns))


def every_row(database: Database, columns: str = COLUMNS, batch: int = 1000) -> Iterator[Row]:
    """`columns` (row first) of all documents, read `batch` at a time."""
    statement = f"SELECT {columns} FROM documents WHERE row > ? ORDER BY row LIMIT ?"
    last = 0
    while rows := database.all(statement, last, batch):
        for row in rows:
            if row[0] <= last:  # or a damaged tree would go round for ever
                raise CatalogError(f"{database.path} is damaged: its rows are not in order")
            last = row[0]
            yield row


def select(sql: Sql, column: str, values: Sequence[object], columns: str = COLUMNS) -> list[Row]:
    """The documents whose `column` is one of `values`."""
    rows: list[Row] = []
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        marks = ", ".join("?" * len(part))
        statement = f"SELECT {columns} FROM documents WHERE {column} IN ({marks})"
        rows += sql.execute(statement, part).fetchall()
    return rows


def count(database: Database) -> int:
    """How many documents there are."""
    return database.number("SELECT COUNT(*) FROM documents")


def embedded(database: Database) -> int:
    """How many documents have an embedding."""
    return database.number("SELECT COUNT(*) FROM documents WHERE embedding IS NOT NULL")


def without_embedding(database: Database) -> set[int]:
    """The rows of documents that have none."""
    return {row for (row,) in database.all("SELECT row FROM documents WHERE embedding IS NULL")}


# Snapshots.


def snapshots(database: Database) -> list[tuple[str | None, int | None]]:
    """Snapshot key and tokens of every document, damaged ones too."""
    rows = database.all("SELECT snapshot_key, CAST(tokens AS INTEGER) FROM documents")
    return [(sound_key(key), tokens) for key, tokens in rows]


def users(database: Database, key: str) -> list[str]:
    """The ids of the documents that use the snapshot `key`."""
    return [id for (id,) in database.all("SELECT id FROM documents WHERE snapshot_key = ?", key)]


def count_users(database: Database, key: str) -> int:
    """How many documents use the snapshot `key`."""
    return database.number("SELECT COUNT(*) FROM documents WHERE snapshot_key = ?", key)


# Versions and changes.


def identity(database: Database) -> str:
    """The catalog's own random name."""
    return str(database.one("SELECT identity FROM state"))


def version(database: Database) -> int:
    """The number of the last change to documents or embeddings."""
    return database.number(_VERSION)


def version_within(sql: Sql) -> int:
    """The same, within a transaction."""
    (found,) = sql.execute(_VERSION).fetchone() or (None,)
    return integer(found)


def has_had(database: Database, asked: int) -> bool:
    """Whether this catalog was ever at the version `asked`, as far as any row tells."""
    known = (
        "SELECT EXISTS (SELECT 1 FROM documents WHERE version = ?1)"
        " OR EXISTS (SELECT 1 FROM tombstones WHERE version = ?1)"
    )
    seen = (0, version(database), index_version(database))
    return asked in seen or bool(database.number(known, asked))


def index_version(database: Database) -> int | None:
    """The version of the index that was saved last; None where none ever was."""
    found = settings(database).get(INDEX_VERSION)
    return None if found is None else integer(found)


def changes_since(database: Database, since: int) -> Changes:
    """What changed after the version `since`, up to one consistent point."""
    changed = "SELECT row, embedding FROM documents WHERE version > ? ORDER BY row"
    gone = "SELECT row FROM tombstones WHERE version > ? ORDER BY row"

    def read(sql: Sql) -> tuple[int, list[Row], list[Row]]:
        now = version_within(sql)
        found = sql.execute(changed, (since,)).fetchall()
        return now, found, sql.execute(gone, (since,)).fetchall()

    return changes(*database.read(read))


def changed_rows(database: Database, since: int) -> tuple[int, list[int]]:
    """The version now, and every row written or deleted after the version `since`."""
    changed = "SELECT row FROM documents WHERE version > ?"
    gone = "SELECT row FROM tombstones WHERE version > ?"

    def read(sql: Sql) -> tuple[int, list[int]]:
        now = version_within(sql)
        rows = sql.execute(f"{changed} UNION {gone}", (since, since)).fetchall()
        return now, [row for (row,) in rows]

    return database.read(read)


# Settings.


def settings(database: Database) -> dict[str, Any]:
    """All settings."""
    rows = database.all("SELECT key, value FROM settings ORDER BY key")
    try:
        return {key: json.loads(value) for key, value in rows}
    except (ValueError, TypeError) as error:
        raise CatalogError(f"{database.path}: found a setting that is not JSON: {error}") from error


def _numbers(rows: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(int(row) for row in rows))
