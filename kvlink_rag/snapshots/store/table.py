"""The table of a store's entries: the only file that knows diskcache.

diskcache keeps the table (SQLite) and its locks; the values are snapshot files, which our `Disk`
hands over by name. Nothing is pickled or unpickled, whatever the table holds (CVE-2025-69872).
Everyone else sees `Rows` for the time of one action. Knows no snapshot's contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.database_paths import cause
from kvlink_rag.disk.forks import undivided
from kvlink_rag.errors import StorageError

from .keys import Refused, checked_key, is_key, key_in, locate

logger = logging.getLogger(__name__)

DATABASE = "cache.db"
FILE_MODE = diskcache.core.MODE_BINARY  # `mode` of a row whose value is a file
_TABLE_FILES = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal")
_LOCK = "lock"
OWN_FILES = (*_TABLE_FILES, _LOCK)  # in the store's directory
_READY = 1  # PRAGMA user_version once every file has its row
_BUSY_SECONDS = 60
_SETTINGS = {
    **diskcache.DEFAULT_SETTINGS,
    "cull_limit": 0,  # diskcache's own culling ignores bytes: ours is `evict`
    "eviction_policy": "none",  # so that a read is not a transaction
    "size_limit": sys.maxsize,
    "sqlite_mmap_size": 0,  # a damaged mapped table would be a SIGBUS
    "disk_min_file_size": 0,
    "disk_pickle_protocol": 0,
}
# Words of SQLite's messages that tell of its surroundings, not of the table's bytes.
_SURROUNDINGS = (
    "locked", "busy", "readonly", "read-only", "full", "unable to open", "disk I/O", "memory"
)  # fmt: skip
# sqlite3 raises UnicodeDecodeError where a damaged table makes it print damaged text.
_TABLE_ERRORS = (sqlite3.Error, diskcache.Timeout, UnicodeDecodeError)
_Result = TypeVar("_Result")

_forked: list[Rows | None] = []


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What the table stores: a file of `size` bytes, to be linked to its place from `source`.

    source: None where it is in its place already.
    """

    name: str
    size: int
    source: Path | None = None


class SnapshotDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are SHA-256 in hexadecimal, values are snapshot files. No pickle, no other type."""

    def put(self, key: object) -> tuple[str, bool]:
        """The table's form of `key`: itself."""
        return checked_key(key), True

    def get(self, key: object, raw: object) -> str:
        """The key of a row."""
        if not raw or not is_key(key):
            raise Refused(f"found a key of type {type(key).__name__}, expected SHA-256")
        return str(key)

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, str, None]:
        """Link the file to its place: (size, mode, file name, no inline value)."""
        if not isinstance(value, StoredFile):
            raise TypeError(f"found a value of type {type(value).__name__}, expected a snapshot")
        if value.source is not None:
            atomic_files.link(value.source, locate(Path(self._directory), value.name, make=True))
        return value.size, FILE_MODE, value.name, None

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> Path:
        """The path of a row's file."""
        try:
            if mode != FILE_MODE or value is not None:
                raise Refused(f"found a row of mode {mode!r}, expected a snapshot file")
            return locate(Path(self._directory), filename)
        except Refused as error:
            logger.warning("a row of the snapshot table is refused: %s", error)
            raise

    def remove(self, file_path: object) -> None:
        """Unlink a row's file, if the name is ours and it is there."""
        with contextlib.suppress(OSError):
            locate(Path(self._directory), file_path).unlink()


class Rows:
    """The open table, for the time of one action: rows, and the files they name."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.directory = Path(cache.directory)

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement on the table `Cache` (or `Settings`); all rows it gives."""
        return list(self._cache._sql(statement, values))

    def transaction(self) -> AbstractContextManager[Any]:
        """All changes within it, or none."""
        transaction: AbstractContextManager[Any] = self._cache.transact()
        return transaction

    def path(self, key: str) -> Path | None:
        """Where the row of `key` says its file is; None where it has none, or a refused one."""
        found = self._cache.get(key)
        return found if isinstance(found, Path) else None

    def put(self, key: str, file: StoredFile) -> None:
        """Link the file to its place and give it its row, in place of what was there."""
        self._cache.set(key, file)

    def delete(self, key: str) -> bool:
        """Unlink the file of `key` and delete its row; False where there was none."""
        return bool(self._cache.delete(key))

    def remove(self, rowid: int, name: object) -> None:
        """The same by rowid, unless another file has taken the row; for rows of any kind."""
        self.unlink(name)
        self.sql("DELETE FROM Cache WHERE rowid = ? AND filename IS ?", rowid, name)

    def unlink(self, name: object) -> None:
        """Unlink the file `name` if it may be one of ours and is there; its row stays."""
        self._cache.disk.remove(name)

    def adopt(self, name: str, size: int) -> None:
        """Give the file `name` its row, if it may be one of ours."""
        key = key_in(name)
        if key is not None:
            self.put(key, StoredFile(name, size))

    def has(self, name: str) -> bool:
        """Whether the file `name` has its row."""
        found = "SELECT 1 FROM Cache WHERE key = ? AND filename = ?"
        key = key_in(name)
        return key is not None and bool(self.sql(found, key, name))

    def total(self, name: str) -> int:
        """`count` or `size` of all entries. Raises `sqlite3.DatabaseError` where it is none."""
        found = self.sql("SELECT value FROM Settings WHERE key = ?", name)
        if not found or not isinstance(found[0][0], int):
            raise sqlite3.DatabaseError(f"found no number for {name!r} in the table's settings")
        return found[0][0]

    def close(self) -> None:
        """Close this thread's connection."""
        self._cache.close()


class Table:
    """The table of the store in `directory`: opened, rebuilt when damaged, changed in one piece.

    frozen: it can be read and not written, on a read-only file system or a disk that is full.
    Raises `StorageError` where it cannot be used for now.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.frozen = directory, False
        self._lock = threading.RLock()
        self._rows: Rows | None = None
        self._inode = 0
        self._pid = os.getpid()
        self.attempt(lambda rows: None)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of a SELECT."""
        return self.attempt(lambda rows: rows.sql(statement, *values))

    def total(self, name: str) -> int:
        """`count` or `size` (bytes) of all entries, as diskcache's triggers keep them."""
        return self.attempt(lambda rows: rows.total(name))

    def change(self, action: Callable[[Rows], _Result]) -> _Result:
        """Run `action` in one write transaction."""

        def transact(rows: Rows) -> _Result:
            with rows.transaction():
                return action(rows)

        return self.attempt(transact)

    def attempt(self, action: Callable[[Rows], _Result]) -> _Result:
        """Run `action`; where the table is damaged, rebuild it and run it once more.

        Raises `StorageError` where that does not help, or the table cannot be used for now.
        """
        with undivided():
            return self._attempt(action)

    def _attempt(self, action: Callable[[Rows], _Result]) -> _Result:
        try:
            return action(self._current())
        except _TABLE_ERRORS as error:
            self.close()  # rolls back
            if self.frozen or not _means_damage(error):
                raise self._error(error) from error
            damage = error
        try:
            self._rebuild_unless_done(damage)
            return action(self._current())
        except (*_TABLE_ERRORS, OSError) as error:
            self.close()
            raise self._error(error) from error

    def rebuild(self) -> None:
        """Forget the table and make it again from the files."""
        with undivided(), self._lock, self._exclusive():
            self.close()
            self._forget()
            self._open()

    def close(self) -> None:
        """Close this thread's connection."""
        with undivided():
            self._leave_to_parent()
            if self._rows is not None:
                self._rows.close()

    def _current(self) -> Rows:
        """The open table; opened again where its file has been replaced or removed."""
        self._leave_to_parent()
        rows = self._rows
        if rows is None or _inode(self.directory / DATABASE) != self._inode or self._has_thawed():
            try:
                with self._lock, self._exclusive():
                    return self._open()
            except OSError as error:
                raise self._error(error) from error
        return rows

    def _has_thawed(self) -> bool:
        """Whether a disk that was full has room again."""
        where = self.directory
        return self.frozen and not (atomic_files.is_read_only(where) or atomic_files.is_full(where))

    def _leave_to_parent(self) -> None:
        """In a forked child: the parent's connections must neither be used nor closed."""
        if self._pid != os.getpid():
            _forked.append(self._rows)
            self._rows, self._pid = None, os.getpid()

    def _rebuild_unless_done(self, damage: Exception) -> None:
        """Rebuild the damaged table, unless another thread or process has done so meanwhile."""
        with self._lock, self._exclusive():
            if _inode(self.directory / DATABASE) == self._inode:
                logger.warning("the snapshot table in %s is rebuilt: %s", self.directory, damage)
                self._forget()
            self._open()

    def _open(self) -> Rows:
        """Open the table, made if need be."""
        path = self.directory / DATABASE
        self.frozen = atomic_files.is_read_only(self.directory)
        if not self.frozen:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._inode = _inode(path)  # the one to rebuild, should it be damaged
        self._rows = Rows(_ReadOnly(self.directory)) if self.frozen else self._open_to_write()
        return self._rows

    def _open_to_write(self) -> Rows:
        """The table; as it stands, where the disk has no room for SQLite's log."""
        try:
            return _open(self.directory)
        except sqlite3.OperationalError as error:
            if _means_damage(error) or not atomic_files.is_full(self.directory):
                raise
            logger.warning("the disk is full: what is in %s is read as it stands", self.directory)
        self.frozen = True
        return Rows(_ReadOnly(self.directory))

    def _forget(self) -> None:
        """Remove the table's files; whoever has them open notices by the inode."""
        for name in _TABLE_FILES:
            (self.directory / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time opens or rebuilds the table."""
        if atomic_files.is_read_only(self.directory):
            yield
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.directory / _LOCK, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _error(self, error: Exception) -> StorageError:
        found = cause(self.directory / DATABASE, error)
        found = found or f"it is locked for more than {_BUSY_SECONDS} s, or not writable"
        return StorageError(f"the snapshot table in {self.directory} cannot be used: {found}")


def _open(directory: Path) -> Rows:
    """The table whose file is there, perhaps empty; every file without a row then gets one."""
    _refuse_settings(directory / DATABASE)
    rows = Rows(_connect(directory))
    rows.sql("CREATE INDEX IF NOT EXISTS Cache_access_time ON Cache (access_time)")
    if rows.sql("PRAGMA user_version") != [(_READY,)]:
        _adopt_all(rows)
    return rows


def _connect(directory: Path) -> Any:
    """diskcache on `directory`, with none of its defaults that do not suit us."""
    path = str(directory)
    if os.path.expandvars(path) != path:
        raise StorageError(f"the path {path} holds a variable, which diskcache would replace")
    try:
        return diskcache.Cache(path, timeout=_BUSY_SECONDS, disk=SnapshotDisk, **_SETTINGS)
    except (TypeError, ValueError, AttributeError) as error:
        raise sqlite3.DatabaseError(f"diskcache cannot read its settings: {error}") from error


class _ReadOnly:
    """The table where nothing can be written, in place of diskcache, which writes when it opens."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.disk = str(directory), SnapshotDisk(str(directory))
        uri = f"{(directory / DATABASE).as_uri()}?mode=ro&immutable=1"
        self._sql = sqlite3.connect(uri, uri=True, check_same_thread=False).execute

    def get(self, key: str) -> Path | None:
        """The path of the file of `key`, as its row has it."""
        row = "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1"
        found = self._sql(row, (key,)).fetchone()
        if found is None:
            return None
        mode, filename, value = found
        try:
            return self.disk.fetch(mode, filename, value, read=True)
        except OSError:
            return None

    def transact(self) -> Any:
        """Refused."""
        raise sqlite3.OperationalError("attempt to write on a read-only file system or a full disk")

    delete = set = transact

    def close(self) -> None:
        """Nothing: the connection is shared, and closes with this object."""


def _means_damage(error: Exception) -> bool:
    """Whether `error` comes from the table's bytes and not from its surroundings."""
    if isinstance(error, sqlite3.OperationalError):
        return not any(word in str(error) for word in _SURROUNDINGS)
    if isinstance(error, sqlite3.ProgrammingError):
        return False
    return isinstance(error, (sqlite3.DatabaseError, UnicodeDecodeError))


def _refuse_settings(path: Path) -> None:
    """Raise `sqlite3.DatabaseError` for settings diskcache would take over as attributes."""
    known = {*_SETTINGS, *diskcache.core.METADATA}
    with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'Settings'")
        if tables.fetchone() is None:
            return
        names = {name for (name,) in connection.execute("SELECT key FROM Settings")}
    if names - known:
        raise sqlite3.DatabaseError(f"found unknown settings {sorted(map(repr, names - known))}")


def _adopt_all(rows: Rows) -> None:
    """Give every snapshot file its row: the table is new, or was lost."""
    with rows.transaction():
        for path in sorted(rows.directory.glob("??/*.safetensors")):
            if not path.parent.is_symlink():
                rows.adopt(f"{path.parent.name}/{path.name}", path.lstat().st_size)
        rows.sql(f"PRAGMA user_version = {_READY}")


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return 0
