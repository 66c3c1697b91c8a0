"""What the server itself remembers: stores, uploaded files, and which file is in which store.

One SQLite file that a single server holds. What is deleted is overwritten in it (`secure_delete`,
no write-ahead log). Knows tables; knows no collection and no HTTP.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvlink_rag.errors import StorageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS stores (id TEXT PRIMARY KEY, created INTEGER NOT NULL,
    owner TEXT NOT NULL, name TEXT NOT NULL, metadata TEXT NOT NULL, leaving INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, created INTEGER NOT NULL,
    owner TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
    leaving INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS held (store TEXT NOT NULL, file TEXT NOT NULL, created INTEGER NOT NULL,
    attributes TEXT NOT NULL, passage_tokens INTEGER NOT NULL, status TEXT NOT NULL,
    code TEXT NOT NULL DEFAULT '', error TEXT NOT NULL DEFAULT '', PRIMARY KEY (store, file));
"""

Status = Literal["in_progress", "completed", "failed"]
PENDING: Status = "in_progress"
DONE: Status = "completed"
FAILED: Status = "failed"


@dataclass(frozen=True, slots=True)
class Store:
    """A collection that a client made. created: seconds since 1970. leaving: being deleted."""

    id: str
    created: int
    owner: str
    name: str
    metadata: dict[str, str]
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Upload:
    """An uploaded file."""

    id: str
    created: int
    owner: str
    name: str
    purpose: str
    bytes: int
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """A file in a store: what became of it, and how it is split."""

    store: str
    file: str
    created: int
    attributes: dict[str, Any]
    passage_tokens: int
    status: Status
    code: str = ""
    error: str = ""


def new_id(kind: str) -> str:
    """An id that nobody guesses, such as `file-…`."""
    return f"{kind}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class Records:
    """The tables, for any number of threads."""

    def __init__(self, path: Path) -> None:
        """Raises `StorageError` where the file cannot be opened."""
        self._lock = threading.Lock()
        try:
            self._sql = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._sql.execute("PRAGMA secure_delete = ON")
            self._sql.executescript(_SCHEMA)
            path.chmod(0o600)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the server's records in {path} cannot be opened: {error}"
            ) from error

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            self._sql.close()

    # Stores

    def add_store(self, store: Store) -> None:
        """Remember a new store."""
        values = (store.id, store.created, store.owner, store.name, json.dumps(store.metadata))
        self._do("INSERT INTO stores VALUES (?, ?, ?, ?, ?, 0)", *values)

    def change_store(self, id: str, name: str, metadata: Mapping[str, str]) -> None:
        """Give it another name and other metadata."""
        self._do("UPDATE stores SET name=?, metadata=? WHERE id=?", name, json.dumps(metadata), id)

    def stores(self) -> list[Store]:
        """All of them, leaving ones too."""
        rows = self._do("SELECT * FROM stores ORDER BY created, rowid")
        return [_store(*row) for row in rows]

    def leave_store(self, id: str) -> None:
        """Mark it: it is not found any more, and what is left of it goes at the next start."""
        self._do("UPDATE stores SET leaving=1 WHERE id=?", id)

    def forget_store(self, id: str) -> None:
        """Drop its rows."""
        self._do("DELETE FROM held WHERE store=?", id)
        self._do("DELETE FROM stores WHERE id=?", id)

    # Files

    def add_file(self, file: Upload) -> None:
        """Remember an upload."""
        values = (file.id, file.created, file.owner, file.name, file.purpose, file.bytes)
        self._do("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, 0)", *values)

    def files(self, ids: Sequence[str] | None = None) -> list[Upload]:
        """All of them, or those of `ids` that are there; leaving ones too."""
        wanted = "" if ids is None else f"WHERE id IN ({','.join('?' * len(ids))})"
        rows = self._do(f"SELECT * FROM files {wanted} ORDER BY created, rowid", *(ids or ()))
        return [Upload(*row) for row in rows]

    def leave_file(self, id: str) -> None:
        """As `leave_store`."""
        self._do("UPDATE files SET leaving=1 WHERE id=?", id)

    def forget_file(self, id: str) -> None:
        """Drop its row."""
        self._do("DELETE FROM files WHERE id=?", id)

    # Files in stores

    def hold(self, held: Held) -> None:
        """Put a file into a store, or change how it is in it."""
        values = (held.store, held.file, held.created, json.dumps(held.attributes))
        more = (held.passage_tokens, held.status, held.code, held.error)
        self._do("INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *values, *more)

    def settle(
        self, store: str, file: str, status: Status, code: str = "", error: str = ""
    ) -> None:
        """What became of a file."""
        change = "UPDATE held SET status=?, code=?, error=? WHERE store=? AND file=?"
        self._do(change, status, code, error, store, file)

    def change_held(self, store: str, file: str, attributes: Mapping[str, Any]) -> None:
        """Give a file in a store other attributes."""
        change = "UPDATE held SET attributes=? WHERE store=? AND file=?"
        self._do(change, json.dumps(dict(attributes)), store, file)

    def let_go(self, store: str, file: str) -> None:
        """Drop a file from a store."""
        self._do("DELETE FROM held WHERE store=? AND file=?", store, file)

    def held(self, *, store: str | None = None, file: str | None = None) -> list[Held]:
        """Files of a store, stores of a file, or all."""
        found = [("store", store), ("file", file)]
        given = [(name, value) for name, value in found if value is not None]
        where = f"WHERE {' AND '.join(f'{name}=?' for name, _ in given)}" if given else ""
        rows = self._do(
            f"SELECT * FROM held {where} ORDER BY created, rowid", *(value for _, value in given)
        )
        return [_held(*row) for row in rows]

    def _do(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._sql.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the server's records cannot be used: {error}") from error


def _store(id: str, created: int, owner: str, name: str, metadata: str, leaving: int) -> Store:
    return Store(id, created, owner, name, json.loads(metadata), bool(leaving))


def _held(store: str, file: str, created: int, attributes: str, tokens: int, *outcome: Any) -> Held:
    return Held(store, file, created, json.loads(attributes), tokens, *outcome)
