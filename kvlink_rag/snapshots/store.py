"""Snapshots in a directory: the only file that knows diskcache.

diskcache keeps the table of entries (SQLite) and its locks; the values are snapshot files, which
our `Disk` hands over by name. Nothing is pickled or unpickled, whatever the table holds
(CVE-2025-69872), and a file name read back from it is used only if it is one we would have given.
Snapshots are derived data: every fault here is a miss, logged, and the caller encodes again.

Changes go in this order, so that a kill at any point costs at most a miss and leaks no file:

    put     temporary file (locked) -> [transaction: link it to its place, row] -> remove temporary
    remove  [transaction: unlink the file, delete the row]

A row without a file is a miss. A file without a row can only be one whose temporary file still
stands, and opening the store removes both. Nothing is fsynced: after a power cut the checksum
decides, and `check` finds what the table forgot.

Recency is the file's mtime, set at each read (one system call, no transaction); a row's
`access_time` is its lower bound. Eviction looks at the oldest row and, where the file's time is
later, moves the row there instead: least recently used, paid for by evictions only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import diskcache

from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.checked_file import require_compression
from kvlink_rag.errors import ConfigError, SnapshotCorrupt, StorageError

from .file_format import read_snapshot, snapshot_size, write_snapshot
from .snapshot import AnySnapshot

logger = logging.getLogger(__name__)

DATABASE = "cache.db"
_TABLE_FILES = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal")
_LOCK = "lock"
_TEMPORARY = "tmp"
_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?P<fan>[0-9a-f]{2})/(?P<key>(?P=fan)[0-9a-f]{62})-[0-9a-f]{16}\.safetensors")
READERS = 8  # files that are read side by side
_TABLE_READY = 1  # PRAGMA user_version once every file has its row
_BUSY_SECONDS = 60
_LOCKING_SECONDS = 0.2
_SETTINGS = {
    **diskcache.DEFAULT_SETTINGS,
    "cull_limit": 0,  # diskcache's own culling ignores bytes: ours is `_evict`
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


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store holds, and what this object has seen since it was opened."""

    count: int
    bytes: int
    hits: int
    misses: int
    corrupt: int
    evicted: int


class SnapshotStore:
    """Snapshots by key, in `directory`, for any number of threads and processes.

    size_limit: bytes of snapshot files to keep at most (the table, some 300 bytes an entry, comes
        on top); None: no limit. Above it the least recently used go, at opening with a warning.
    compress: whether new files are compressed, losslessly; what is read may be either.
    Raises `StorageError` where the directory cannot be opened or written. A damaged table is
    rebuilt from the files. On a read-only file system the store can be read, and only that.
    Raises `MissingExtra` where `compress` is asked for and zstandard is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        size_limit: int | None = None,
        compress: bool = False,
    ) -> None:
        if compress:
            require_compression()
        self.directory = Path(os.path.realpath(directory))
        self.size_limit, self.compress = size_limit, compress
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        try:
            atomic_files.private_directory(self.directory)
            self._temporary = atomic_files.private_directory(self.directory / _TEMPORARY)
            self._table = _Table(self.directory)
            self._sweep()
            self._shrink()
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"the store {directory} cannot be opened: {error}") from error

    def get(self, key: str, token_ids: Sequence[int]) -> AnySnapshot | None:
        """The snapshot of `key`, or None where it is missing or not what was written.

        Its real token ids must be `token_ids`. A corrupt file is logged, counted and removed. The
        tensors are views of a mapping that outlives eviction.
        """
        return self.get_many({key: token_ids})[key]

    def get_many(self, wanted: Mapping[str, Sequence[int]]) -> dict[str, AnySnapshot | None]:
        """As `get`, of several keys (each with its token ids) whose files are read side by side.

        A disk gives most when several reads are under way, and the checksum of one file runs while
        the next one comes in.
        """
        paths = {key: self._path(key) for key in wanted}
        reads: dict[str, Callable[[], AnySnapshot]] = {
            key: partial(read_snapshot, path, key=key, token_ids=wanted[key])
            for key, path in paths.items()
            if path is not None
        }
        if len(reads) > 1:
            with ThreadPoolExecutor(min(len(reads), READERS), "snapshots") as readers:
                reads = {key: readers.submit(read).result for key, read in reads.items()}
        found = {
            key: self._read(key, path, reads[key]) if path is not None else None
            for key, path in paths.items()
        }
        for snapshot in found.values():
            self._count("misses" if snapshot is None else "hits")
        return found

    def put(self, key: str, snapshot: AnySnapshot) -> bool:
        """Store `snapshot` under `key`, in place of what was there.

        False where it alone is larger than `size_limit`. Raises `StorageError` where the file or
        the table cannot be written, a full disk for one; the entry before it may be gone then.
        """
        name = f"{_checked_key(key)[:2]}/{key}-{secrets.token_hex(8)}.safetensors"
        size = snapshot_size(snapshot, key)
        if self.size_limit is not None and size > self.size_limit:
            logger.warning("snapshot %s (%d bytes) is over the limit, not kept", key, size)
            return False
        try:
            self._make_room(size)
            with atomic_files.temporary(self._temporary, Path(name).name) as file:
                size = write_snapshot(file, snapshot, key, compress=self.compress)
                self._insert(key, _Entry(name, size, Path(file.name)))
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"snapshot {key} cannot be written: {error}") from error
        return True

    def delete(self, key: str) -> bool:
        """Remove the snapshot of `key`; False where there was none. Raises `StorageError`."""
        _checked_key(key)
        return self._table.change(lambda cache: bool(cache.delete(key)))

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        return path is not None and path.exists()

    def __len__(self) -> int:
        return self._table.total("count")

    def keys(self) -> list[str]:
        """The keys of all entries, oldest first."""
        rows = self._table.query("SELECT key FROM Cache ORDER BY rowid")
        return [key for (key,) in rows if _is_key(key)]

    def bytes(self) -> int:
        """Bytes of all snapshot files."""
        return self._table.total("size")

    def stats(self) -> StoreStats:
        """Counts and bytes."""
        with self._counts_lock:
            seen = {name: self._counts[name] for name in ("hits", "misses", "corrupt", "evicted")}
        return StoreStats(count=len(self), bytes=self.bytes(), **seen)

    def check(self, fix: bool = False) -> list[str]:
        """What is wrong in the directory, one line each; reads every file. `fix` mends it all.

        A file that lost its row gets it back where it is sound; all else that is damaged or
        unknown is removed, since it can be made again.
        """
        steps = (_check_table, _check_rows, _check_leftovers, _check_unknown, _check_totals)
        try:
            return [line for step in steps for line in step(self, fix)]
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"the store {self.directory} cannot be read: {error}") from error

    def close(self) -> None:
        """Close this thread's connection; those of other threads close with them."""
        self._table.close()

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _path(self, key: str) -> Path | None:
        """Where the row of `key` says its file is; a table that cannot be read is a miss."""
        _checked_key(key)
        try:
            return self._table.lookup(key)
        except StorageError as error:
            logger.warning("snapshot %s cannot be looked up: %s", key, error)
            return None

    def _read(self, key: str, path: Path, read: Callable[[], AnySnapshot]) -> AnySnapshot | None:
        """What `read` gives of the file at `path`; None, logged, where it raises."""
        try:
            snapshot = read()
            _touch(path)
            return snapshot
        except SnapshotCorrupt as error:
            logger.warning("snapshot %s is corrupt and is dropped: %s", key, error)
            self._count("corrupt")
            with contextlib.suppress(StorageError):
                self._drop(key, path)
        except FileNotFoundError:
            logger.info("snapshot %s has lost its file %s", key, path)
        except OSError as error:
            logger.warning("snapshot %s cannot be read: %s", key, error)
        return None

    def _drop(self, key: str, path: Path) -> None:
        """Remove the entry of `key` unless another file has taken its place."""

        def drop(cache: Any) -> None:
            if cache.get(key) == path:
                cache.delete(key)

        self._table.change(drop)

    def _insert(self, key: str, entry: _Entry) -> None:
        """Link the file to its place and give it its row; without the row it does not stay."""

        def insert(cache: Any) -> int:
            try:
                with cache.transact():
                    cache.set(key, entry)
                    return _evict(cache, self.size_limit)
            except BaseException:
                cache.disk.remove(entry.name)
                raise

        self._evicted(self._table.attempt(insert))

    def _make_room(self, size: int) -> None:
        """Evict before writing, so that the files never take more than the limit."""
        if self.size_limit is not None and self.bytes() + size > self.size_limit:
            room = self.size_limit - size
            self._evicted(self._table.change(lambda cache: _evict(cache, room)))

    def _shrink(self) -> None:
        """Evict what was stored under a larger limit, and say how much that is."""
        limit = self.size_limit
        if limit is None or self.bytes() <= limit or atomic_files.is_read_only(self.directory):
            return

        def evict(cache: Any) -> tuple[int, int]:
            before = _total(cache, "size")
            return _evict(cache, limit), before - _total(cache, "size")

        number, size = self._table.change(evict)
        self._evicted(number)
        logger.warning(
            "evicted %d snapshots (%d bytes) to stay below %d bytes; they are encoded again when "
            "they are needed",
            number,
            size,
            limit,
        )

    def _sweep(self) -> list[str]:
        """Remove what dead writers left: their temporary file, and its link without a row."""
        removed: list[str] = []
        if atomic_files.is_read_only(self.directory):
            return removed
        for leftover in atomic_files.abandoned(self._temporary):
            name = atomic_files.temporary_for(leftover) or ""
            if _NAME.fullmatch(f"{name[:2]}/{name}"):
                self._remove_unless_known(f"{name[:2]}/{name}")
            leftover.unlink(missing_ok=True)
            removed.append(leftover.name)
        return removed

    def _remove_unless_known(self, name: str) -> bool:
        """Unlink the file `name` if no row has it; whether it was unlinked."""

        def remove(cache: Any) -> bool:
            if _has_row(cache, name):
                return False
            cache.disk.remove(name)
            return True

        return self._table.change(remove)

    def _evicted(self, number: int) -> None:
        if number:
            logger.info("%d snapshots evicted to stay below %s bytes", number, self.size_limit)
            self._count("evicted", number)

    def _count(self, name: str, number: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += number


@dataclass(frozen=True, slots=True)
class _Entry:
    """What `SnapshotDisk` stores: a file, to be linked to its place unless it is there."""

    name: str
    size: int
    source: Path | None = None


class _Refused(OSError):
    """A row that is not ours. diskcache takes an OSError for a miss."""


class SnapshotDisk(diskcache.Disk):  # type: ignore[misc]
    """Keys are SHA-256 in hexadecimal, values are snapshot files. No pickle, no other type."""

    def put(self, key: object) -> tuple[str, bool]:
        """The table's form of `key`: itself."""
        return _checked_key(key), True

    def get(self, key: object, raw: object) -> str:
        """The key of a row."""
        if not raw or not _is_key(key):
            raise _Refused(f"found a key of type {type(key).__name__}, expected SHA-256")
        return str(key)

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, str, None]:
        """Link the file to its place: (size, mode, file name, no inline value)."""
        if not isinstance(value, _Entry):
            raise TypeError(f"found a value of type {type(value).__name__}, expected a snapshot")
        if value.source is not None:
            atomic_files.link(value.source, _locate(Path(self._directory), value.name, make=True))
        return value.size, diskcache.core.MODE_BINARY, value.name, None

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> Path:
        """The path of a row's file."""
        try:
            if mode != diskcache.core.MODE_BINARY or value is not None:
                raise _Refused(f"found a row of mode {mode!r}, expected a snapshot file")
            return _locate(Path(self._directory), filename)
        except _Refused as error:
            logger.warning("a row of the snapshot table is refused: %s", error)
            raise

    def remove(self, file_path: object) -> None:
        """Unlink a row's file, if the name is ours and it is there."""
        with contextlib.suppress(OSError):
            _locate(Path(self._directory), file_path).unlink()


class _Table:
    """diskcache's table of entries: opened, rebuilt when damaged, one transaction a change."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._cache: Any = None
        self._inode = 0
        self.attempt(lambda cache: None)

    def lookup(self, key: str) -> Path | None:
        """The path of the file of `key`, as its row has it."""
        found = self.attempt(lambda cache: cache.get(key))
        return found if isinstance(found, Path) else None

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of a SELECT."""
        return self.attempt(lambda cache: list(cache._sql(statement, values)))

    def total(self, name: str) -> int:
        """`count` or `size` (bytes) of all entries, as diskcache's triggers keep them."""
        return self.attempt(lambda cache: _total(cache, name))

    def change(self, action: Callable[[Any], _Result]) -> _Result:
        """Run `action(cache)` in one write transaction."""

        def transact(cache: Any) -> _Result:
            with cache.transact():
                return action(cache)

        return self.attempt(transact)

    def attempt(self, action: Callable[[Any], _Result]) -> _Result:
        """Run `action(cache)`; where the table is damaged, rebuild it and run it once more.

        Raises `StorageError` where that does not help, or the table cannot be used for now.
        """
        try:
            return action(self._current())
        except _TABLE_ERRORS as error:
            self.close()  # rolls back
            if not _means_damage(error):
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
        with self._lock, self._exclusive():
            self.close()
            self._forget()
            self._open()

    def close(self) -> None:
        """Close this thread's connection."""
        if self._cache is not None:
            self._cache.close()

    def _current(self) -> Any:
        """The open table; opened again where its file has been replaced or removed."""
        if self._cache is None or _inode(self._directory / DATABASE) != self._inode:
            try:
                with self._lock, self._exclusive():
                    self._open()
            except OSError as error:
                raise self._error(error) from error
        return self._cache

    def _rebuild_unless_done(self, damage: Exception) -> None:
        """Rebuild the damaged table, unless another thread or process has done so meanwhile."""
        with self._lock, self._exclusive():
            if _inode(self._directory / DATABASE) == self._inode:
                logger.warning("the snapshot table in %s is rebuilt: %s", self._directory, damage)
                self._forget()
            self._open()

    def _open(self) -> None:
        """Open the table, made if need be; every file without a row then gets one."""
        if atomic_files.is_read_only(self._directory):
            self._cache = _ReadOnly(self._directory)
            self._inode = _inode(self._directory / DATABASE)
            return
        path = self._directory / DATABASE
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._inode = _inode(path)
        _refuse_settings(path)
        cache = _connect(self._directory)
        cache._sql("CREATE INDEX IF NOT EXISTS Cache_access_time ON Cache (access_time)")
        if cache._sql("PRAGMA user_version").fetchone() != (_TABLE_READY,):
            _adopt_all(cache)
        self._cache = cache

    def _forget(self) -> None:
        """Remove the table's files; whoever has them open notices by the inode."""
        for name in _TABLE_FILES:
            (self._directory / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time opens or rebuilds the table."""
        if atomic_files.is_read_only(self._directory):
            yield
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._directory / _LOCK, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _error(self, error: Exception) -> StorageError:
        cause = str(error) or f"it is locked for more than {_BUSY_SECONDS} s, or not writable"
        return StorageError(f"the snapshot table in {self._directory} cannot be used: {cause}")


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
    """The table on a read-only file system, in place of diskcache, which writes when it opens."""

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
        raise sqlite3.OperationalError("attempt to write on a read-only file system")

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


def _adopt_all(cache: Any) -> None:
    """Give every snapshot file its row: the table is new, or was lost."""
    with cache.transact():
        for path in sorted(Path(cache.directory).glob("??/*.safetensors")):
            name = f"{path.parent.name}/{path.name}"
            if _NAME.fullmatch(name) and not path.parent.is_symlink():
                _adopt(cache, name, path.lstat().st_size)
        cache._sql(f"PRAGMA user_version = {_TABLE_READY}")


def _adopt(cache: Any, name: str, size: int) -> None:
    match = _NAME.fullmatch(name)
    if match is not None:
        cache.set(match["key"], _Entry(name, size))


def _evict(cache: Any, limit: int | None) -> int:
    """Remove the least recently used until at most `limit` bytes stay; how many went.

    Within a transaction. Each row moves at most once, to the time its file was last read.
    """
    evicted = 0
    oldest = (
        "SELECT rowid, filename, CAST(COALESCE(access_time, 0) AS REAL) FROM Cache"
        " ORDER BY access_time LIMIT 1"
    )
    while limit is not None and _total(cache, "size") > limit:
        row = cache._sql(oldest).fetchone()
        if row is None:
            break
        rowid, filename, time = row
        used = _last_use(cache, filename)
        if used > time + 1e-3:
            cache._sql("UPDATE Cache SET access_time = ? WHERE rowid = ?", (used, rowid))
            continue
        cache.disk.remove(filename)
        cache._sql("DELETE FROM Cache WHERE rowid = ?", (rowid,))
        evicted += 1
    return evicted


def _last_use(cache: Any, filename: object) -> float:
    try:
        return _locate(Path(cache.directory), filename).lstat().st_mtime
    except OSError:
        return 0.0


def _total(cache: Any, name: str) -> int:
    row = cache._sql("SELECT value FROM Settings WHERE key = ?", (name,)).fetchone()
    if row is None or not isinstance(row[0], int):
        raise sqlite3.DatabaseError(f"found no number for {name!r} in the table's settings")
    return row[0]


def _has_row(cache: Any, name: str) -> bool:
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    row = "SELECT 1 FROM Cache WHERE key = ? AND filename = ?"
    return cache._sql(row, (match["key"], name)).fetchone() is not None


# What `check` looks at, step by step.


def _check_table(store: SnapshotStore, fix: bool) -> Iterator[str]:
    found = store._table.query("PRAGMA integrity_check")
    if found != [("ok",)]:
        yield f"the table {DATABASE} is damaged: {found[0][0]}"
        if fix:
            store._table.rebuild()


def _check_rows(store: SnapshotStore, fix: bool) -> Iterator[str]:
    statement = "SELECT rowid, key, raw, mode, size, filename, value FROM Cache"
    for rowid, *row in store._table.query(statement):
        problem = _row_problem(store.directory, *row)
        if problem is not None and _settled_row(store, statement, rowid) == [(rowid, *row)]:
            yield problem
            if fix:
                store._table.change(partial(_remove_row, rowid=rowid, name=row[4]))


def _settled_row(store: SnapshotStore, statement: str, rowid: int) -> list[Any]:
    """The row once no writer is in the middle of a change: one unlinks before it deletes."""
    again = f"{statement} WHERE rowid = ?"
    if atomic_files.is_read_only(store.directory):
        return list(store._table.query(again, rowid))
    return list(store._table.change(lambda cache: cache._sql(again, (rowid,)).fetchall()))


def _row_problem(
    directory: Path,
    key: object,
    raw: object,
    mode: object,
    size: object,
    name: object,
    value: object,
) -> str | None:
    """What is wrong with one row and its file, if anything."""
    if not _is_key(key) or raw != 1 or mode != diskcache.core.MODE_BINARY or value is not None:
        return f"a row of another kind: key {str(key)[:64]!r}, mode {mode!r}, file {name!r}"
    try:
        path = _locate(directory, name)
        if path.lstat().st_size != size:
            return f"wrong size: {name} has {path.lstat().st_size} bytes, its row says {size}"
        read_snapshot(path, key=str(key))
    except _Refused as error:
        return f"refused row {key}: {error}"
    except FileNotFoundError:
        return f"missing file: {name}"
    except SnapshotCorrupt as error:
        return f"corrupt file: {error}"
    except OSError as error:
        if error.errno != errno.EIO:
            raise  # its surroundings: too many open files, no permission
        return f"unreadable file: {error}"
    return None


def _remove_row(cache: Any, rowid: int, name: object) -> None:
    cache.disk.remove(name)
    cache._sql("DELETE FROM Cache WHERE rowid = ? AND filename IS ?", (rowid, name))


def _check_leftovers(store: SnapshotStore, fix: bool) -> Iterator[str]:
    found = set(atomic_files.abandoned(store._temporary))
    if found:
        time.sleep(_LOCKING_SECONDS)  # a living writer locks its file right after making it
        found &= set(atomic_files.abandoned(store._temporary))
    for leftover in sorted(found):
        yield f"leftover temporary file: {leftover.name}"
    if fix:
        store._sweep()


def _check_unknown(store: SnapshotStore, fix: bool) -> Iterator[str]:
    known = {name for (name,) in store._table.query("SELECT filename FROM Cache")}
    for name in _names(store.directory):
        if name in known or store._table.change(partial(_has_row, name=name)):
            continue
        if not os.path.lexists(store.directory / name):
            continue  # evicted since it was listed
        yield f"unknown file: {os.fsencode(name).decode(errors='backslashreplace')}"
        if fix:
            store._table.change(partial(_adopt_or_remove, name=name))


def _names(directory: Path) -> Iterator[str]:
    """Everything in the store that is not a directory of ours, its table or a temporary file."""
    for root, directories, names in os.walk(directory, topdown=False):
        links = [name for name in directories if os.path.islink(os.path.join(root, name))]
        for name in sorted(names + links):
            path = Path(root, name)
            relative = path.relative_to(directory).as_posix()
            in_temporary = path.parent == directory / _TEMPORARY
            if relative not in (*_TABLE_FILES, _LOCK) and not (
                in_temporary and atomic_files.temporary_for(path)
            ):
                yield relative


def _adopt_or_remove(cache: Any, name: str) -> None:
    """Give a sound snapshot file its row back; remove anything else."""
    path = Path(cache.directory, name)
    match = _NAME.fullmatch(name)
    try:
        if match is None or cache.get(match["key"]) is not None:
            raise _Refused("not a snapshot that lacks a row")
        read_snapshot(_locate(Path(cache.directory), name), key=match["key"])
        _adopt(cache, name, path.lstat().st_size)
    except OSError:
        path.unlink(missing_ok=True)


def _check_totals(store: SnapshotStore, fix: bool) -> Iterator[str]:
    for name, actual in (("count", "COUNT(*)"), ("size", "COALESCE(SUM(size), 0)")):
        store._table.total(name)  # a table without one is rebuilt
        kept = "SELECT value FROM Settings WHERE key = ?"
        # one statement, so one moment: a writer may be at work
        both = store._table.query(f"SELECT ({kept}), (SELECT {actual} FROM Cache)", name)
        for found, expected in both:
            if found != expected:
                yield f"wrong total: {name} is {found}, expected {expected}"
                if fix:
                    store._table.change(_recount)


def _recount(cache: Any) -> None:
    cache._sql("UPDATE Settings SET value = (SELECT COUNT(*) FROM Cache) WHERE key = 'count'")
    cache._sql(
        "UPDATE Settings SET value = (SELECT COALESCE(SUM(size), 0) FROM Cache) WHERE key = 'size'"
    )


# Names and files.


def _is_key(key: object) -> bool:
    return type(key) is str and _KEY.fullmatch(key) is not None


def _checked_key(key: object) -> str:
    if not _is_key(key):
        raise ConfigError(f"found the key {key!r}, expected 64 hexadecimal digits (snapshot_key)")
    return str(key)


def _locate(directory: Path, name: object, *, make: bool = False) -> Path:
    """The path of a snapshot file. Raises `_Refused` for any name but one we would have given."""
    if type(name) is not str or _NAME.fullmatch(name) is None:
        raise _Refused(f"found the file name {name!r}, expected one of a snapshot")
    parent = directory / name[:2]
    if make:
        parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink():
        raise _Refused(f"found {parent} to be a symbolic link, expected a directory")
    return directory / name


def _touch(path: Path) -> None:
    """Note that the file was used; a store that may not be written keeps no recency."""
    with contextlib.suppress(OSError):
        os.utime(path, follow_symlinks=False)


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return 0
