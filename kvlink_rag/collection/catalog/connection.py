"""Connections to a catalog's file, and transactions on them. Knows no table and no document.

One transaction a change, on the disk before it is acknowledged (WAL, `synchronous=FULL`). What
SQLite and the system raise is told as ours. A file that was removed or replaced is noticed before
each transaction; on a read-only file system it is read as it stands, and so is one that nobody has
open on a disk that is full, where SQLite finds no room for its log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.database_paths import cause, printable, require_text
from kvlink_rag.disk.forks import undivided
from kvlink_rag.errors import CatalogError, DocumentError

from .records import Row

logger = logging.getLogger(__name__)

_PRAGMAS = (
    "synchronous=FULL",
    "secure_delete=ON",  # not every SQLite is built so: deleted text would stay in free pages
    "trusted_schema=OFF",
    "cell_size_check=ON",
    "mmap_size=0",
)
_BUSY_SECONDS = 60
_IDLE_CONNECTIONS = 4
_TRIES = 3  # to read a file that somebody writes to

Sql = sqlite3.Connection
_Result = TypeVar("_Result")

_forked: list[list[Sql]] = []
_opening = threading.Lock()


class Database:
    """Connections to the file at `path`, lent to one user at a time, few kept.

    For any number of threads and processes. Raises `CatalogError` where it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _identity(path)
        self._idle: list[Sql] = []
        self._pid = os.getpid()

    def read(self, action: Callable[[Sql], _Result]) -> _Result:
        """Run `action` on one consistent state."""
        return self._transact("BEGIN", action)

    def write(self, action: Callable[[Sql], _Result]) -> _Result:
        """Run `action` in one write transaction, on the disk when this returns."""
        return self._transact("BEGIN IMMEDIATE", action)

    def all(self, statement: str, *values: object) -> list[Row]:
        """All rows of a SELECT."""
        return self.read(lambda sql: sql.execute(statement, values).fetchall())

    def one(self, statement: str, *values: object) -> Any:
        """The one value of a SELECT."""
        rows = self.all(statement, *values)
        if len(rows) != 1:
            raise CatalogError(f"{self.path} is damaged: found {len(rows)} rows, expected 1")
        return rows[0][0]

    def number(self, statement: str, *values: object) -> int:
        """The one number of a SELECT."""
        return integer(self.one(statement, *values))

    def purge(self) -> None:
        """Empty log and free pages. Raises `CatalogError` where others read for too long."""
        with undivided(), errors(self.path), self._connection() as sql:
            (busy, _, _) = sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise CatalogError(
                    f"the log of {self.path} is being read by another process and still holds what "
                    "was deleted; try again when it has ended"
                )
            sql.execute("VACUUM")
            sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close the connections that are not in use."""
        with undivided(), contextlib.suppress(IndexError):
            self._leave_to_parent()
            while True:
                self._idle.pop().close()

    def _transact(self, begin: str, action: Callable[[Sql], _Result]) -> _Result:
        with undivided(), errors(self.path):
            if begin != "BEGIN":
                return self._on_connection(begin, action)
            return _with_or_without_room(
                self.path, lambda: self._on_connection(begin, action), action
            )

    def _on_connection(self, begin: str, action: Callable[[Sql], _Result]) -> _Result:
        with self._connection() as sql:
            before = sql.total_changes
            sql.execute(begin)
            result = action(sql)
            written = sql.total_changes > before
            sql.execute("COMMIT")
            if written:
                _checkpoint(sql)
            return result

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Sql]:
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

    def _take(self) -> Sql:
        self._leave_to_parent()
        if _identity(self.path) != self._file:
            raise CatalogError(
                f"the catalog {self.path} was removed or replaced while it was open; bring it "
                "back from a backup if it is gone, then open the collection again"
            )
        try:
            return self._idle.pop()
        except IndexError:
            return connect(self.path)

    def _leave_to_parent(self) -> None:
        """In a forked child: the parent's connections must neither be used nor closed."""
        if self._pid != os.getpid():
            _forked.append(self._idle)
            self._idle, self._pid = [], os.getpid()


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """While the catalog at `path` is looked for, made and opened.

    A thread that closes a file drops the process's POSIX locks on it, also SQLite's in another
    thread: so no catalog is opened while one is made.
    """
    with undivided(), errors(path), _opening:
        require_text(path)
        yield


def connect(path: Path, journal: str = "journal_mode=WAL") -> Sql:
    """A connection that never creates the file; for reading, on a read-only file system."""
    if atomic_files.is_read_only(path.parent):
        return _connect_frozen(path, "a read-only file system")
    return _connected(f"{path.as_uri()}?mode=rw", (*_PRAGMAS, journal))


def read_once(path: Path, action: Callable[[Sql], _Result]) -> _Result:
    """Run `action`, which reads, on a connection of its own."""

    def connected() -> _Result:
        with contextlib.closing(connect(path)) as sql:
            return action(sql)

    return _with_or_without_room(path, connected, action)


def _with_or_without_room(
    path: Path, attempt: Callable[[], _Result], action: Callable[[Sql], _Result]
) -> _Result:
    """What `attempt` gives; where a full disk has no room for it, `action` on the file alone."""
    try:
        return attempt()
    except sqlite3.OperationalError as error:
        if not (_lacks_room(error) and atomic_files.is_full(path.parent)):
            raise
    return _as_it_stands(path, action)


def _as_it_stands(path: Path, action: Callable[[Sql], _Result]) -> _Result:
    """Run `action` on the file alone: without log, shared memory and locks, which need room.

    Raises `CatalogError` where a log holds changes, or somebody writes meanwhile.
    """
    for _ in range(_TRIES):
        before = path.stat()
        with contextlib.closing(_connect_frozen(path, "a full disk")) as sql:
            result = action(sql)
        after = path.stat()
        _refuse_log(path, "a full disk")
        if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
            return result
    raise CatalogError(f"{path} is being written, on a disk that is full; make room and try again")


def _connect_frozen(path: Path, where: str) -> Sql:
    """A connection to a file that nobody writes to meanwhile."""
    _refuse_log(path, where)
    return _connected(f"{path.as_uri()}?mode=ro&immutable=1", _PRAGMAS)


def _connected(uri: str, pragmas: Sequence[str]) -> Sql:
    sql = sqlite3.connect(
        uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    sql.text_factory = _decode
    try:
        for pragma in pragmas:
            sql.execute(f"PRAGMA {pragma}")
    except BaseException:
        sql.close()
        raise
    return sql


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
    """Tell SQLite's and the system's errors as ours."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise DocumentError(f"found {error.object[:40]!r}, expected valid Unicode") from error
    except CatalogError:
        raise
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        what = f"the catalog {printable(path)} cannot be used"
        raise CatalogError(f"{what}: {cause(path, error)}") from error


def integer(found: object) -> int:
    """`found`. Raises `CatalogError` where it is no number, as every one that we write is."""
    if not isinstance(found, int):
        raise CatalogError(f"the catalog is damaged: found {found!r}, expected a number")
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at `path`: an open connection would go on writing to one that was removed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _decode(data: bytes) -> str:
    """Text as it is stored; of damaged text something, so that its checksum can tell."""
    return data.decode(errors="backslashreplace")


def _lacks_room(error: sqlite3.OperationalError) -> bool:
    """Whether SQLite failed as it does where its log or shared memory finds no room."""
    return any(
        words in str(error) for words in ("disk is full", "disk I/O error", "unable to open")
    )


def _refuse_log(path: Path, where: str) -> None:
    """Raise where changes wait in the log: nobody can bring them in there."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise CatalogError(
            f"{path} lies on {where} and {log.name} holds changes; open it once where it can be "
            "written"
        )


def _checkpoint(sql: Sql) -> None:
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
