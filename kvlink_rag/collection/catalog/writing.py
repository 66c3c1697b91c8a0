"""Changes to a catalog, each one write transaction with a number of its own.

The version is the number of the last change; a row carries that of the change that wrote it last,
and a deleted one leaves it in a tombstone, so that an index can be brought up to date.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .connection import Database, Sql
from .reading import select, version_within
from .records import (
    COLUMNS,
    Array,
    Columns,
    Entry,
    Record,
    Row,
    Upserted,
    columns_of,
    former,
    is_whole,
    pack,
)

_STEP = 1 << 31  # the most that a change adds to the version
_CONTENT = ("title", "text", "metadata", "content_hash", "snapshot_key", "tokens", "embedding")


class _Change:
    """The number of the change a transaction makes; counted only if it makes one.

    Numbers grow by a random step, so that a catalog brought back from a backup does not use those
    again that an index or another process has seen before.
    """

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._version: int | None = None

    def version(self) -> int:
        if self._version is None:
            step = 1 + secrets.randbelow(_STEP)
            self._sql.execute("UPDATE state SET version = version + ?", (step,))
            self._version = version_within(self._sql)
        return self._version


def upsert(database: Database, records: Sequence[Record]) -> Upserted:
    """Write `records`; of those with one id the last counts."""
    rows = {columns.id: columns for columns in map(columns_of, records)}

    def write(sql: Sql) -> Upserted:
        change, done = _Change(sql), Upserted([], [], [])
        for columns in rows.values():
            _upsert(sql, columns, change, done)
        return done

    return database.write(write)


def delete(database: Database, ids: Iterable[str]) -> list[Entry]:
    """Delete documents; what was there."""
    wanted = list(dict.fromkeys(ids))

    def write(sql: Sql) -> list[Entry]:
        rows, change = select(sql, "id", wanted), _Change(sql)
        for row in rows:
            sql.execute("DELETE FROM documents WHERE row = ?", (row[0],))
            sql.execute("INSERT INTO tombstones VALUES (?, ?)", (row[0], change.version()))
        return [former(row) for row in rows]

    return database.write(write)


def set_snapshots(database: Database, items: Iterable[tuple[Entry, str | None, int | None]]) -> int:
    """Set snapshot key and tokens of entries whose content is still theirs; how many were set."""
    values = [(key, tokens, e.row, e.content_hash) for e, key, tokens in items]
    update = "UPDATE documents SET snapshot_key = ?, tokens = ? WHERE row = ? AND content_hash = ?"
    return database.write(lambda sql: sql.executemany(update, values).rowcount if values else 0)


def set_embeddings(database: Database, items: Iterable[tuple[Entry, Array | None]]) -> int:
    """Set or drop embeddings of entries whose content is still theirs; how many were set."""
    values = [(None if v is None else pack(v, e.id), e) for e, v in items]
    update = "UPDATE documents SET embedding = ?, version = ? WHERE row = ? AND content_hash = ?"

    def write(sql: Sql) -> int:
        change = _Change(sql)
        rows = [(blob, change.version(), e.row, e.content_hash) for blob, e in values]
        return sum(sql.execute(update, row).rowcount for row in rows)

    return database.write(write)


def drop_embeddings(database: Database, rows: Sequence[int]) -> None:
    """Drop the embeddings of `rows`."""
    update = "UPDATE documents SET embedding = NULL, version = ? WHERE row = ?"

    def write(sql: Sql) -> None:
        change = _Change(sql)
        for row in rows:
            sql.execute(update, (change.version(), row))

    database.write(write)


def set_settings(database: Database, values: Mapping[str, Any], *, replace: bool = True) -> None:
    """Set settings (JSON values); without `replace`, only those that are not set yet."""
    rows = [(key, json.dumps(value, allow_nan=False)) for key, value in values.items()]
    insert = f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO settings (key, value)"
    database.write(lambda sql: sql.executemany(f"{insert} VALUES (?, ?)", rows))


def reindex(database: Database) -> None:
    """Make SQLite's own indexes again."""
    database.write(lambda sql: sql.execute("REINDEX"))


def _upsert(sql: Sql, columns: Columns, change: _Change, done: Upserted) -> None:
    """Write one record and note in `done` what happened."""
    statement = f"SELECT {COLUMNS} FROM documents WHERE id = ?"
    found = sql.execute(statement, (columns.id,)).fetchone()
    if found is None:
        _insert(sql, columns, change.version())
        done.added.append(columns.id)
    elif found[5] == columns.content_hash and is_whole(found):
        _complete(sql, found, columns, change)
        done.unchanged.append(columns.id)
    else:
        _replace(sql, found, columns, change.version())
        done.replaced.append(former(found))


def _insert(sql: Sql, columns: Columns, version: int) -> None:
    names = ("id", *_CONTENT)
    statement = f"INSERT INTO documents ({', '.join(names)}, version) VALUES (?{', ?' * 8})"
    sql.execute(statement, (*(getattr(columns, name) for name in names), version))


def _replace(sql: Sql, found: Row, columns: Columns, version: int) -> None:
    """Write a record over a row; an embedding of the same title and text stays."""
    same = found[2:4] == (columns.title, columns.text) and is_whole(found)
    keeps = same and columns.embedding is None
    written = [name for name in _CONTENT if not (keeps and name == "embedding")]
    names = ", ".join(f"{name} = ?" for name in written)
    statement = f"UPDATE documents SET {names}, version = ? WHERE row = ?"
    sql.execute(statement, (*(getattr(columns, name) for name in written), version, found[0]))


def _complete(sql: Sql, found: Row, columns: Columns, change: _Change) -> None:
    """Give an unchanged document what it lacked: its embedding, its snapshot key."""
    row, embedded = found[0], found[8]
    if not embedded and columns.embedding is not None:
        update = "UPDATE documents SET embedding = ?, version = ? WHERE row = ?"
        sql.execute(update, (columns.embedding, change.version(), row))
    if columns.snapshot_key is not None and columns.snapshot_key != found[6]:
        update = "UPDATE documents SET snapshot_key = ?, tokens = ? WHERE row = ?"
        sql.execute(update, (columns.snapshot_key, columns.tokens, row))
