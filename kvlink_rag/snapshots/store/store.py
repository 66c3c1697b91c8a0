"""`SnapshotStore`: put, get and delete snapshots by key, within a limit of bytes.

Snapshots are derived data: every fault here is a miss, logged, and the caller encodes again.
Changes go in this order, so that a kill at any point costs at most a miss and leaks no file:

    put     temporary file (locked) -> [transaction: link it to its place, row] -> remove temporary
    remove  [transaction: unlink the file, delete the row]

A row without a file is a miss. A file without a row can only be one whose temporary file still
stands, and opening the store removes both. Nothing is fsynced: after a power cut the checksum
decides, and `check` finds what the table forgot.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.checked_file import require_compression
from kvlink_rag.disk.database_paths import printable, require_text
from kvlink_rag.disk.forks import ForkSafeLock, undivided
from kvlink_rag.errors import SnapshotCorrupt, StorageError
from kvlink_rag.snapshots.file_format import read_snapshot, snapshot_size, write_snapshot
from kvlink_rag.snapshots.snapshot import AnySnapshot, Shape

from .checking import check, sweep
from .eviction import evict, touch
from .keys import checked_key, is_key, new_name
from .table import Rows, StoredFile, Table

logger = logging.getLogger(__name__)

_READERS = 8  # files that are read side by side
_TEMPORARY = "tmp"


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
        self._counts_lock = ForkSafeLock()
        self._temporary = self.directory / _TEMPORARY
        try:
            require_text(self.directory)
            atomic_files.private_directory(self.directory)
            if not atomic_files.is_read_only(self.directory) or os.path.lexists(self._temporary):
                atomic_files.private_directory(self._temporary)
            self._table = Table(self.directory)
            sweep(self._table, self._temporary)
            self._shrink()
        except StorageError:
            raise
        except OSError as error:
            what = f"the store {printable(self.directory)} cannot be opened"
            raise StorageError(f"{what}: {error}") from error

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
            with ThreadPoolExecutor(min(len(reads), _READERS), "snapshots") as readers:
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
        name = new_name(checked_key(key))
        size = snapshot_size(snapshot, key)
        if self.size_limit is not None and size > self.size_limit:
            logger.warning("snapshot %s (%d bytes) is over the limit, not kept", key, size)
            return False
        try:
            self._make_room(size)
            with atomic_files.temporary(self._temporary, Path(name).name) as file:
                size = write_snapshot(file, snapshot, key, compress=self.compress)
                self._insert(key, StoredFile(name, size, Path(file.name)))
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"snapshot {key} cannot be written: {error}") from error
        return True

    def file_of(self, key: str) -> bytes | None:
        """The bytes of the file of `key`, unchecked; None where there is none to be read."""
        path = self._path(key)
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            logger.info("snapshot %s cannot be read: %s", key, error)
            return None

    def adopt(self, key: str, file: bytes, token_ids: Sequence[int], shape: Shape) -> AnySnapshot:
        """Store a file that another store wrote for `key`, and give its snapshot.

        Where it cannot be kept it is given all the same. Raises `SnapshotCorrupt` where it is not
        what is written for `key`, `token_ids` and a model of this shape, and `StorageError` where
        there is no room to look at it.
        """
        name = new_name(checked_key(key))
        try:
            with atomic_files.temporary(self._temporary, Path(name).name) as target:
                atomic_files.write_all(target, memoryview(file))
                path = Path(target.name)
                snapshot = read_snapshot(path, key=key, token_ids=token_ids)
                if snapshot.shape != shape:
                    raise SnapshotCorrupt(f"found the shape {snapshot.shape}, expected {shape}")
                self._keep(key, StoredFile(name, len(file), path))
        except OSError as error:
            raise StorageError(f"snapshot {key} cannot be written: {error}") from error
        return snapshot

    def _keep(self, key: str, file: StoredFile) -> None:
        try:
            if self.size_limit is None or file.size <= self.size_limit:
                self._make_room(file.size)
                self._insert(key, file)
        except (StorageError, OSError) as error:
            logger.warning("snapshot %s is used but not stored: %s", key, error)

    def delete(self, key: str) -> bool:
        """Remove the snapshot of `key`; False where there was none. Raises `StorageError`."""
        checked_key(key)
        return self._table.change(lambda rows: rows.delete(key))

    def __contains__(self, key: str) -> bool:
        path = self._path(key)
        return path is not None and path.exists()

    def __len__(self) -> int:
        return self._table.total("count")

    def keys(self) -> list[str]:
        """The keys of all entries, oldest first."""
        rows = self._table.query("SELECT key FROM Cache ORDER BY rowid")
        return [key for (key,) in rows if is_key(key)]

    def bytes(self) -> int:
        """Bytes of all snapshot files."""
        return self._table.total("size")

    def stats(self) -> StoreStats:
        """Counts and bytes."""
        with undivided(), self._counts_lock:
            seen = {name: self._counts[name] for name in ("hits", "misses", "corrupt", "evicted")}
        return StoreStats(count=len(self), bytes=self.bytes(), **seen)

    def check(self, fix: bool = False) -> list[str]:
        """What is wrong in the directory, one line each; reads every file. `fix` mends it all.

        A file that lost its row gets it back where it is sound; all else that is damaged or
        unknown is removed, since it can be made again.
        """
        try:
            return list(check(self._table, self._temporary, fix))
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
        checked_key(key)
        try:
            return self._table.attempt(lambda rows: rows.path(key))
        except StorageError as error:
            logger.warning("snapshot %s cannot be looked up: %s", key, error)
            return None

    def _read(self, key: str, path: Path, read: Callable[[], AnySnapshot]) -> AnySnapshot | None:
        """What `read` gives of the file at `path`; None, logged, where it raises."""
        try:
            snapshot = read()
            touch(path)
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

        def drop(rows: Rows) -> None:
            if rows.path(key) == path:
                rows.delete(key)

        self._table.change(drop)

    def _insert(self, key: str, file: StoredFile) -> None:
        """Link the file to its place and give it its row; without the row it does not stay."""

        def insert(rows: Rows) -> int:
            try:
                with rows.transaction():
                    rows.put(key, file)
                    return evict(rows, self.size_limit)
            except BaseException:
                rows.unlink(file.name)
                raise

        self._evicted(self._table.attempt(insert))

    def _make_room(self, size: int) -> None:
        """Evict before writing, so that the files never take more than the limit."""
        if self.size_limit is not None and self.bytes() + size > self.size_limit:
            room = self.size_limit - size
            self._evicted(self._table.change(lambda rows: evict(rows, room)))

    def _shrink(self) -> None:
        """Evict what was stored under a larger limit, and say how much that is."""
        limit = self.size_limit
        if limit is None or self.bytes() <= limit or self._table.frozen:
            return

        def shrink(rows: Rows) -> tuple[int, int]:
            before = rows.total("size")
            return evict(rows, limit), before - rows.total("size")

        number, size = self._table.change(shrink)
        self._evicted(number)
        logger.warning(
            "evicted %d snapshots (%d bytes) to stay below %d bytes; they are encoded again when "
            "they are needed",
            number,
            size,
            limit,
        )

    def _evicted(self, number: int) -> None:
        if number:
            logger.info("%d snapshots evicted to stay below %s bytes", number, self.size_limit)
            self._count("evicted", number)

    def _count(self, name: str, number: int = 1) -> None:
        with undivided(), self._counts_lock:
            self._counts[name] += number
