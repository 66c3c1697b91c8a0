"""The catalog: documents, metadata, embeddings and settings in SQLite. It is the truth.

The index and the snapshots are derived from it. One transaction a change, on the disk before it
is acknowledged (WAL, `synchronous=FULL`). Knows rows and versions; knows neither what an
embedding means nor where snapshots lie. The schema stands in `docs/formats.md`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from kvlink_rag.disk import atomic_files
from kvlink_rag.documents import Document
from kvlink_rag.errors import CatalogError, DocumentError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
APPLICATION_ID = 0x4B564C4B  # "KVLK"
_SCHEMA = (
    """CREATE TABLE documents (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        title TEXT NOT NULL,
        text TEXT NOT NULL,
        metadata TEXT NOT NULL,
        content_hash TEXT NOT NULL,
        snapshot_key TEXT,
        tokens INTEGER,
        embedding BLOB,
        version INTEGER NOT NULL
    )""",
    "CREATE INDEX documents_version ON documents (version)",
    "CREATE INDEX documents_snapshot ON documents (snapshot_key) WHERE snapshot_key IS NOT NULL",
    "CREATE TABLE tombstones (row INTEGER PRIMARY KEY, version INTEGER NOT NULL)",
    "CREATE INDEX tombstones_version ON tombstones (version)",
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE state (identity TEXT NOT NULL, version INTEGER NOT NULL)",
)
_PRAGMAS = ("synchronous=FULL", "trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0")
_COLUMNS = (
    "row, id, title, text, metadata, content_hash, snapshot_key, tokens,"
    " embedding IS NOT NULL, version"
)
_KEY = re.compile(r"[0-9a-f]{64}")
_BUSY_SECONDS = 60
_AT_ONCE = 500  # values in one IN (...)
_IDLE_CONNECTIONS = 4
_INDEX_VERSION = "index_version"  # the setting: of the index saved last
_STEP = 1 << 31  # the most that a change adds to the version

Array = npt.NDArray[Any]
_Sql = sqlite3.Connection
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A document to be written, with its embedding (float32 [dimension]) where there is one."""

    document: Document
    embedding: Array | None = None
    snapshot_key: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A document as the catalog holds it.

    row: its number in the index, never used again for another document.
    content_hash: SHA-256 of id, title, text and metadata, in hexadecimal.
    snapshot_key, tokens: of its snapshot, None while it has none.
    embedded: whether it has an embedding.
    version: the change that wrote it last.
    """

    row: int
    document: Document
    content_hash: str
    snapshot_key: str | None
    tokens: int | None
    embedded: bool
    version: int

    @property
    def id(self) -> str:
        """The document's id."""
        return str(self.document.id)


@dataclass(frozen=True, slots=True)
class Upserted:
    """What `upsert` did: ids added and unchanged, and the entries it replaced, as they were."""

    added: list[str]
    replaced: list[Entry]
    unchanged: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What an index of an earlier version lacks.

    version: the catalog's version that these changes lead to.
    rows: int64 [n] rows to add or replace; vectors: float32 [n, dimension], theirs.
    removed: int64 [m] rows that are gone or have no embedding any more.
    """

    version: int
    rows: Array
    vectors: Array
    removed: Array


class Catalog:
    """Open it with `Catalog.open`. For any number of threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = _Pool(path)
        self.identity = str(self._one("SELECT identity FROM state"))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        siblings: Sequence[str] = (),
    ) -> Catalog:
        """Open the catalog at `path`; with `create`, make it where there is none.

        siblings: names beside `path` that exist only where a catalog was: if the catalog is
        missing or empty and one of them is there, it was lost, and is not silently made anew.
        Raises `CatalogError` where it is missing, lost, damaged, of another schema version or
        cannot be opened.
        """
        path = Path(os.path.realpath(path))
        beside = (*siblings, f"{path.name}-wal")
        lost = [f"{name} beside it" for name in beside if (path.parent / name).exists()]
        with _errors(path), _OPENING:
            if not atomic_files.is_read_only(path.parent):
                _sweep(path)
            if not path.exists() or path.stat().st_size == 0:
                _refuse_lost(path, create, lost)
                _create(path)
            _check_schema(path)
            return cls(path)

    def upsert(self, records: Sequence[Record]) -> Upserted:
        """Write `records` in one transaction; on the disk when this returns.

        Content that is stored already is not touched, except that an embedding it lacked is
        added. A replaced document keeps its row and loses embedding and snapshot key unless the
        record brings them. Of records with one id the last counts. Raises `DocumentError` for
        text that is not valid Unicode, metadata that is not JSON or a bad embedding.
        """
        rows = {values.id: values for values in map(_values, records)}

        def write(sql: _Sql) -> Upserted:
            change = _Change(sql)
            done = Upserted([], [], [])
            for values in rows.values():
                _upsert(sql, values, change, done)
            return done

        return self._write(write)

    def delete(self, ids: Iterable[str]) -> list[Entry]:
        """Delete documents in one transaction; what was there. Unknown ids are left out."""
        wanted = list(dict.fromkeys(ids))

        def write(sql: _Sql) -> list[Entry]:
            rows = _select(sql, "id", wanted)
            change = _Change(sql)
            for row in rows:
                sql.execute("DELETE FROM documents WHERE row = ?", (row[0],))
                sql.execute("INSERT INTO tombstones VALUES (?, ?)", (row[0], change.version()))
            return [_former(row) for row in rows]

        return self._write(write)

    def get(self, ids: Iterable[str], *, skip_damaged: bool = False) -> list[Entry]:
        """The entries of `ids`, in that order; unknown ids are left out.

        Raises `CatalogError` for one that is damaged, unless `skip_damaged` leaves those out too.
        """
        wanted = list(dict.fromkeys(ids))
        found = {row[1]: row for row in self._read(lambda sql: _select(sql, "id", wanted))}
        return _entries((found[id] for id in wanted if id in found), skip_damaged)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that the catalog does not hold; a damaged document is held."""
        wanted = list(dict.fromkeys(ids))
        found = {row[1] for row in self._read(lambda sql: _select(sql, "id", wanted))}
        return [id for id in wanted if id not in found]

    def by_rows(self, rows: Iterable[int]) -> list[Entry]:
        """The entries of `rows`, in that order; rows that are gone are left out."""
        wanted = list(dict.fromkeys(int(row) for row in rows))
        found = {row[0]: row for row in self._read(lambda sql: _select(sql, "row", wanted))}
        return [_entry(found[row]) for row in wanted if row in found]

    def iterate(self, batch: int = 1000, *, skip_damaged: bool = False) -> Iterator[Entry]:
        """All entries by row, read `batch` at a time; changes meanwhile may be seen or not.

        Raises `CatalogError` for one that is damaged, unless `skip_damaged` leaves those out.
        """
        for row in self._rows(_COLUMNS, batch):
            yield from _entries([row], skip_damaged)

    def snapshots(self) -> list[tuple[str | None, int | None]]:
        """Snapshot key and tokens of every document, damaged ones too."""
        rows = self._all("SELECT snapshot_key, CAST(tokens AS INTEGER) FROM documents")
        return [(_key(key), tokens) for key, tokens in rows]

    def users(self, key: str) -> list[str]:
        """The ids of the documents that use the snapshot `key`."""
        return [id for (id,) in self._all("SELECT id FROM documents WHERE snapshot_key = ?", key)]

    def count(self) -> int:
        """How many documents there are."""
        return self._number("SELECT COUNT(*) FROM documents")

    def embedded(self) -> int:
        """How many documents have an embedding: the size of an index that is up to date."""
        return self._number("SELECT COUNT(*) FROM documents WHERE embedding IS NOT NULL")

    def without_embedding(self) -> set[int]:
        """The rows of documents that have none."""
        rows = self._all("SELECT row FROM documents WHERE embedding IS NULL")
        return {row for (row,) in rows}

    def version(self) -> int:
        """The number of the last change to documents or embeddings, by any process (cheap)."""
        return self._number(_VERSION)

    def has_had(self, version: int) -> bool:
        """Whether this catalog was ever at `version`; False also where no row tells any more.

        Numbers are not used again by another history (`_Change`), so an index that was saved
        before a backup was brought back is told from one that this catalog led to.
        """
        known = (
            "SELECT EXISTS (SELECT 1 FROM documents WHERE version = ?1)"
            " OR EXISTS (SELECT 1 FROM tombstones WHERE version = ?1)"
        )
        seen = (0, self.version(), self.index_version())
        return version in seen or bool(self._number(known, version))

    def index_version(self) -> int | None:
        """The version of the index that was saved last; None where none ever was."""
        found = self.settings().get(_INDEX_VERSION)
        return None if found is None else _integer(found)

    def remember_index(self, version: int) -> None:
        """Note, before it is saved, an index of `version`, if this catalog was ever at it.

        The rows that tell so may all be replaced later.
        """
        if self.has_had(version):
            self.set_setting(_INDEX_VERSION, version)

    def changes_since(self, version: int) -> Changes:
        """What changed after `version` (0: everything), up to one consistent point.

        Raises `CatalogError` where an embedding's bytes are not what was written.
        """
        changed = "SELECT row, embedding FROM documents WHERE version > ? ORDER BY row"
        gone = "SELECT row FROM tombstones WHERE version > ? ORDER BY row"

        def read(sql: _Sql) -> tuple[int, list[Any], list[Any]]:
            now = _version(sql)
            found = sql.execute(changed, (version,)).fetchall()
            return now, found, sql.execute(gone, (version,)).fetchall()

        return _changes(*self._read(read))

    def changed_rows(self, version: int) -> tuple[int, list[int]]:
        """The version now, and every row written or deleted after `version` (0: all rows)."""
        changed = "SELECT row FROM documents WHERE version > ?"
        gone = "SELECT row FROM tombstones WHERE version > ?"

        def read(sql: _Sql) -> tuple[int, list[int]]:
            now = _version(sql)
            rows = sql.execute(f"{changed} UNION {gone}", (version, version)).fetchall()
            return now, [row for (row,) in rows]

        return self._read(read)

    def texts(self, rows: Iterable[int]) -> Iterator[tuple[int, str, str, str]]:
        """Row, id, title and text of those `rows` that are there; contents are not verified."""
        wanted = list(dict.fromkeys(int(row) for row in rows))
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(part))
            yield from self._all(
                f"SELECT row, id, title, text FROM documents WHERE row IN ({marks})", *part
            )

    def snapshot_users(self, key: str) -> int:
        """How many documents use the snapshot `key`."""
        return self._number("SELECT COUNT(*) FROM documents WHERE snapshot_key = ?", key)

    def set_snapshots(self, items: Iterable[tuple[Entry, str | None, int | None]]) -> int:
        """Set snapshot key and tokens of entries, in one transaction; how many were set.

        An entry whose content was replaced or deleted meanwhile is left alone. The catalog's
        version stays: the index does not depend on this.
        """
        values = [(key, tokens, e.row, e.content_hash) for e, key, tokens in items]
        update = (
            "UPDATE documents SET snapshot_key = ?, tokens = ? WHERE row = ? AND content_hash = ?"
        )
        return self._write(lambda sql: sql.executemany(update, values).rowcount if values else 0)

    def set_embeddings(self, items: Iterable[tuple[Entry, Array | None]]) -> int:
        """Set or drop (None) embeddings of entries, in one transaction; how many were set.

        An entry whose content was replaced or deleted meanwhile is left alone.
        """
        values = [(None if v is None else _pack(v, e.id), e) for e, v in items]
        update = (
            "UPDATE documents SET embedding = ?, version = ? WHERE row = ? AND content_hash = ?"
        )

        def write(sql: _Sql) -> int:
            change = _Change(sql)
            rows = [(blob, change.version(), e.row, e.content_hash) for blob, e in values]
            return sum(sql.execute(update, row).rowcount for row in rows)

        return self._write(write)

    def settings(self) -> dict[str, Any]:
        """All settings."""
        rows = self._all("SELECT key, value FROM settings ORDER BY key")
        try:
            return {key: json.loads(value) for key, value in rows}
        except (ValueError, TypeError) as error:
            raise CatalogError(f"{self.path}: found a setting that is not JSON: {error}") from error

    def set_settings(self, values: Mapping[str, Any]) -> None:
        """Set settings (JSON values) in one transaction; those not named stay."""
        rows = [(key, json.dumps(value, allow_nan=False)) for key, value in values.items()]
        update = "INSERT OR REPLACE INTO settings (key, value) VALUES (?, ?)"
        self._write(lambda sql: sql.executemany(update, rows))

    def set_first(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set those of `values` that are not set yet, in one transaction; all settings then."""
        rows = [(key, json.dumps(value, allow_nan=False)) for key, value in values.items()]
        insert = "INSERT OR IGNORE INTO settings (key, value) VALUES (?, ?)"
        self._write(lambda sql: sql.executemany(insert, rows))
        return self.settings()

    def set_setting(self, key: str, value: Any) -> None:
        """Set one setting (a JSON value)."""
        self.set_settings({key: value})

    def check(self, fix: bool = False) -> list[str]:
        """What is wrong, one line each; reads everything.

        `fix` rebuilds SQLite's indexes and drops embeddings that are not what was written (they
        can be made again: `Changes.removed` tells the index). Damaged text stays reported: it is
        the truth, and only adding the document again mends it.
        """
        problems = self._check_database(fix)
        try:
            return problems + self._check_documents() + self._check_embeddings(fix)
        except CatalogError as error:
            return [*problems, str(error)]

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._pool.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_database(self, fix: bool) -> list[str]:
        statement = "PRAGMA integrity_check"
        found = [str(line) for (line,) in self._all(statement)]
        if found != ["ok"] and fix:
            self._write(lambda sql: sql.execute("REINDEX"))
        return [] if found == ["ok"] else [f"damaged database: {line}" for line in found]

    def _check_documents(self) -> list[str]:
        problems = []
        for row in self._rows(_COLUMNS):
            try:
                _entry(row)
            except CatalogError as error:
                problems.append(str(error))
        return problems

    def _check_embeddings(self, fix: bool) -> list[str]:
        bad = [row for row, blob in self._rows("row, embedding") if not _is_sound(blob)]
        if bad and fix:
            self._write(lambda sql: _drop_embeddings(sql, bad))
        return [f"damaged embedding: row {row}" for row in bad]

    def _rows(self, columns: str, batch: int = 1000) -> Iterator[tuple[Any, ...]]:
        """`columns` (row first) of all documents, read `batch` at a time."""
        statement = f"SELECT {columns} FROM documents WHERE row > ? ORDER BY row LIMIT ?"
        last = 0
        while rows := self._all(statement, last, batch):
            for row in rows:
                if row[0] <= last:  # or a damaged tree would go round for ever
                    raise CatalogError(f"{self.path} is damaged: its rows are not in order")
                last = row[0]
                yield row

    def _one(self, statement: str, *values: object) -> Any:
        """The one value of a SELECT."""
        rows = self._all(statement, *values)
        if len(rows) != 1:
            raise CatalogError(f"{self.path} is damaged: found {len(rows)} rows, expected 1")
        return rows[0][0]

    def _number(self, statement: str, *values: object) -> int:
        return _integer(self._one(statement, *values))

    def _all(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._read(lambda sql: sql.execute(statement, values).fetchall())

    def _read(self, action: Callable[[_Sql], _Result]) -> _Result:
        """Run `action` on one consistent state."""
        return self._transact("BEGIN", action)

    def _write(self, action: Callable[[_Sql], _Result]) -> _Result:
        """Run `action` in one write transaction, on the disk when this returns."""
        return self._transact("BEGIN IMMEDIATE", action)

    def _transact(self, begin: str, action: Callable[[_Sql], _Result]) -> _Result:
        with _errors(self.path), self._pool.connection() as sql:
            before = sql.total_changes
            sql.execute(begin)
            result = action(sql)
            written = sql.total_changes > before
            sql.execute("COMMIT")
            if written:
                _checkpoint(sql)
            return result


class _Pool:
    """Connections to one database, lent to one user at a time, few kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _identity(path)
        self._idle: list[_Sql] = []
        self._pid = os.getpid()

    @contextlib.contextmanager
    def connection(self) -> Iterator[_Sql]:
        """Lend a connection; after an error it is closed, which rolls back."""
        sql = self._take()
        try:
            yield sql
        except BaseException:
            sql.close()
            raise
        if len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append(sql)
        else:
            sql.close()

    def close(self) -> None:
        """Close the idle connections."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _take(self) -> _Sql:
        if self._pid != os.getpid():  # forked: SQLite's connections must not be used, nor closed
            _FORKED.append(self._idle)
            self._idle, self._pid = [], os.getpid()
        if _identity(self._path) != self._file:
            raise CatalogError(
                f"the catalog {self._path} was removed or replaced while it was open; bring it "
                "back from a backup if it is gone, then open the collection again"
            )
        try:
            return self._idle.pop()
        except IndexError:
            return _connect(self._path)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at `path`: an open connection would go on writing to one that was removed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


_FORKED: list[list[_Sql]] = []
# A thread that closes a file drops the process's POSIX locks on it, also SQLite's in another
# thread: so no catalog is opened while one is made.
_OPENING = threading.Lock()


def _connect(path: Path, journal: str = "journal_mode=WAL") -> _Sql:
    """A connection that never creates the file; for reading, on a read-only file system."""
    frozen = atomic_files.is_read_only(path.parent)
    if frozen:
        _refuse_log(path)
    sql = sqlite3.connect(
        f"{path.as_uri()}?{'mode=ro&immutable=1' if frozen else 'mode=rw'}",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    sql.text_factory = _decode
    try:
        for pragma in _PRAGMAS if frozen else (*_PRAGMAS, journal):
            sql.execute(f"PRAGMA {pragma}")
    except BaseException:
        sql.close()
        raise
    return sql


def _decode(data: bytes) -> str:
    """Text as it is stored; of damaged text something, so that its checksum can tell."""
    return data.decode(errors="backslashreplace")


def _refuse_log(path: Path) -> None:
    """Raise where changes wait in the log: on a read-only file system nobody can bring them in."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise CatalogError(
            f"{path} lies on a read-only file system and {log.name} holds changes; open it once "
            "where it can be written"
        )


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Tell SQLite's and the system's errors as ours."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise DocumentError(f"found {error.object[:40]!r}, expected valid Unicode") from error
    except CatalogError:
        raise
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"the catalog {path} cannot be used: {error}") from error


def _refuse_lost(path: Path, create: bool, lost: Sequence[str]) -> None:
    """Raise unless a catalog may be made at `path`: none was there before."""
    if path.exists():
        lost = [f"an empty {path.name}", *lost]
    if lost:
        raise CatalogError(
            f"found no catalog at {path}, but {', '.join(lost)}, so it was lost; bring the file "
            "back from a backup, or remove the directory and index again"
        )
    if not create:
        raise CatalogError(f"found no catalog at {path}; check the path, or create one")


def _sweep(path: Path) -> None:
    """Remove what creations that were killed left beside `path`."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        if path.exists() and leftover.exists() and path.samefile(leftover):
            leftover.unlink(missing_ok=True)  # unopened: see _OPENING
    for leftover in atomic_files.abandoned(path.parent, path.name):
        leftover.unlink(missing_ok=True)


def _create(path: Path) -> None:
    """Make an empty catalog appear at `path`, whole, unless another process was faster."""
    with atomic_files.temporary(path.parent, path.name) as file:
        _write_schema(Path(file.name))
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            atomic_files.link(Path(file.name), path)
    atomic_files.sync_directory(path.parent)


def _write_schema(path: Path) -> None:
    """Fill the empty file at `path`, without a journal beside it."""
    with contextlib.closing(_connect(path, "journal_mode=MEMORY")) as sql:
        sql.execute("BEGIN")
        for statement in _SCHEMA:
            sql.execute(statement)
        sql.execute("INSERT INTO state VALUES (?, 0)", (uuid.uuid4().hex,))
        sql.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        sql.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        sql.execute("COMMIT")


def _check_schema(path: Path) -> None:
    """Raise `CatalogError` unless the database is a catalog of this version, unaltered."""
    with contextlib.closing(_connect(path)) as sql:
        (application,) = sql.execute("PRAGMA application_id").fetchone()
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        names = "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"
        found = {text for (text,) in sql.execute(names)}
    if application != APPLICATION_ID:
        raise CatalogError(f"{path} is not a catalog: found application id {application:#x}")
    if version != SCHEMA_VERSION:
        raise CatalogError(
            f"{path} has schema version {version}, expected {SCHEMA_VERSION}; open it with the "
            "release that wrote it, or index again into a new directory"
        )
    if found != set(_SCHEMA):
        raise CatalogError(f"{path} is damaged: its tables are not those of a catalog")


def _checkpoint(sql: _Sql) -> None:
    """Bring the change into the database file and empty the write-ahead log, unless it is in use.

    At rest the catalog is then one file, and no later damage to the log can undo a change. Skipped
    while another connection reads; the next change, or the last close, catches up.
    """
    try:
        sql.execute("PRAGMA busy_timeout = 0")
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error as error:
        logger.debug("the catalog's log stays for now: %s", error)
    finally:
        sql.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")


_VERSION = "SELECT version FROM state"


def _version(sql: _Sql) -> int:
    (found,) = sql.execute(_VERSION).fetchone() or (None,)
    return _integer(found)


def _integer(found: object) -> int:
    if not isinstance(found, int):
        raise CatalogError(f"the catalog is damaged: found {found!r}, expected a number")
    return found


def _key(found: object) -> str | None:
    """A snapshot's key as it is stored; a damaged one is none, and set again by `check`."""
    return found if isinstance(found, str) and _KEY.fullmatch(found) else None


class _Change:
    """The number of the change a transaction makes; counted only if it makes one.

    Numbers grow by a random step, so that a catalog brought back from a backup does not use those
    again that an index or another process has seen before.
    """

    def __init__(self, sql: _Sql) -> None:
        self._sql = sql
        self._version: int | None = None

    def version(self) -> int:
        if self._version is None:
            step = 1 + secrets.randbelow(_STEP)
            self._sql.execute("UPDATE state SET version = version + ?", (step,))
            self._version = _version(self._sql)
        return self._version


@dataclass(frozen=True, slots=True)
class _Values:
    """A record as columns."""

    id: str
    title: str
    text: str
    metadata: str
    content_hash: str
    snapshot_key: str | None
    tokens: int | None
    embedding: bytes | None


def _values(record: Record) -> _Values:
    document = record.document.identified()
    _check_unicode(str(document.id), document.title, document.text)
    document.canonical()  # DocumentError where the metadata is not JSON
    metadata = json.dumps(dict(document.metadata), allow_nan=False, separators=(",", ":"))
    document = replace(document, metadata=json.loads(metadata))
    return _Values(
        id=str(document.id),
        title=document.title,
        text=document.text,
        metadata=metadata,
        content_hash=_content_hash(document),
        snapshot_key=record.snapshot_key,
        tokens=None if record.tokens is None else int(record.tokens),
        embedding=None if record.embedding is None else _pack(record.embedding, str(document.id)),
    )


def _check_unicode(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            start = max(0, error.start - 20)
            raise DocumentError(
                f"found a lone surrogate in {text[start : error.end + 20]!r}, expected valid "
                "Unicode; replace it first: text.encode('utf-8', 'replace').decode()"
            ) from error


def _content_hash(document: Document) -> str:
    content = json.dumps(document.id, ensure_ascii=True) + document.canonical()
    return hashlib.sha256(content.encode()).hexdigest()


def _pack(embedding: Array, id: str) -> bytes:
    """float32, little-endian, and the XXH3-64 of these bytes behind them."""
    vector = np.asarray(embedding)
    if vector.ndim != 1 or not len(vector) or vector.dtype != np.float32:
        found = f"{vector.dtype} {list(vector.shape)}"
        raise DocumentError(f"document {id!r}: found embedding {found}, expected float32 [n]")
    if not np.isfinite(vector).all():
        raise DocumentError(f"document {id!r}: found an embedding that is not finite")
    data = vector.astype("<f4").tobytes()
    return data + _digest(data)


def _digest(data: bytes) -> bytes:
    return bytes(xxhash.xxh3_64_digest(data))


def _is_sound(blob: bytes | None) -> bool:
    if not isinstance(blob, bytes):
        return blob is None
    data, digest = bytes(blob[:-8]), bytes(blob[-8:])
    return len(data) > 0 and len(data) % 4 == 0 and digest == _digest(data)


def _upsert(sql: _Sql, values: _Values, change: _Change, done: Upserted) -> None:
    """Write one record and note in `done` what happened."""
    statement = f"SELECT {_COLUMNS} FROM documents WHERE id = ?"
    found = sql.execute(statement, (values.id,)).fetchone()
    if found is None:
        _insert(sql, values, change.version())
        done.added.append(values.id)
    elif found[5] == values.content_hash and _is_whole(found):
        _complete(sql, found, values, change)
        done.unchanged.append(values.id)
    else:
        _replace(sql, found[0], values, change.version())
        done.replaced.append(_former(found))


_CONTENT = ("title", "text", "metadata", "content_hash", "snapshot_key", "tokens", "embedding")


def _insert(sql: _Sql, values: _Values, version: int) -> None:
    names = ("id", *_CONTENT)
    statement = f"INSERT INTO documents ({', '.join(names)}, version) VALUES (?{', ?' * 8})"
    sql.execute(statement, (*(getattr(values, name) for name in names), version))


def _replace(sql: _Sql, row: int, values: _Values, version: int) -> None:
    columns = ", ".join(f"{name} = ?" for name in _CONTENT)
    statement = f"UPDATE documents SET {columns}, version = ? WHERE row = ?"
    sql.execute(statement, (*(getattr(values, name) for name in _CONTENT), version, row))


def _complete(sql: _Sql, found: tuple[Any, ...], values: _Values, change: _Change) -> None:
    """Give an unchanged document what it lacked: its embedding, its snapshot key."""
    row, embedded = found[0], found[8]
    if not embedded and values.embedding is not None:
        update = "UPDATE documents SET embedding = ?, version = ? WHERE row = ?"
        sql.execute(update, (values.embedding, change.version(), row))
    if values.snapshot_key is not None and values.snapshot_key != found[6]:
        update = "UPDATE documents SET snapshot_key = ?, tokens = ? WHERE row = ?"
        sql.execute(update, (values.snapshot_key, values.tokens, row))


def _drop_embeddings(sql: _Sql, rows: Sequence[int]) -> None:
    change = _Change(sql)
    for row in rows:
        drop = "UPDATE documents SET embedding = NULL, version = ? WHERE row = ?"
        sql.execute(drop, (change.version(), row))


def _select(sql: _Sql, column: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
    """The documents whose `column` is one of `values`."""
    rows: list[tuple[Any, ...]] = []
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        marks = ", ".join("?" * len(part))
        statement = f"SELECT {_COLUMNS} FROM documents WHERE {column} IN ({marks})"
        rows += sql.execute(statement, part).fetchall()
    return rows


def _entry(row: tuple[Any, ...]) -> Entry:
    """A row as an entry. Raises `CatalogError` where its content is not what was written."""
    number, id, title, text, metadata, content_hash, key, tokens, embedded, version = row
    try:
        document = Document(text=text, title=title, id=id, metadata=json.loads(metadata))
        damaged = _content_hash(document) != content_hash
    except (ValueError, TypeError):
        damaged = True
    if damaged:
        raise CatalogError(
            f"document {id!r} (row {number}) is damaged: its content is not what was written; "
            "delete it and add it again"
        )
    return Entry(number, document, content_hash, _key(key), tokens, bool(embedded), version)


def _former(row: tuple[Any, ...]) -> Entry:
    """A row that is no more, as it was; one that is damaged, without text."""
    if _is_whole(row):
        return _entry(row)
    number, id, _, _, _, content_hash, key, tokens, embedded, version = row
    document = Document("", id=str(id) or "?")
    return Entry(number, document, content_hash, _key(key), tokens, bool(embedded), version)


def _entries(rows: Iterable[tuple[Any, ...]], skip_damaged: bool) -> list[Entry]:
    """Rows as entries; with `skip_damaged` only those that are what was written."""
    return [_entry(row) for row in rows if not skip_damaged or _is_whole(row)]


def _is_whole(row: tuple[Any, ...]) -> bool:
    try:
        _entry(row)
    except CatalogError:
        return False
    return True


def _changes(version: int, changed: list[Any], gone: list[Any]) -> Changes:
    for row, blob in changed:
        if not _is_sound(blob):
            raise CatalogError(f"the embedding of row {row} is damaged; run check with fix")
    kept = [(row, blob) for row, blob in changed if blob is not None]
    removed = [row for (row,) in gone] + [row for row, blob in changed if blob is None]
    if len({len(blob) for _, blob in kept}) > 1:
        raise CatalogError("found embeddings of several dimensions; embed all documents again")
    dimension = (len(kept[0][1]) - 8) // 4 if kept else 0
    data = b"".join(bytes(blob[:-8]) for _, blob in kept)
    return Changes(
        version=version,
        rows=np.array([row for row, _ in kept], dtype=np.int64),
        vectors=np.frombuffer(data, dtype="<f4").reshape(len(kept), dimension),
        removed=np.array(removed, dtype=np.int64),
    )
