"""One writer of a collection at a time, among all threads and processes. Knows a lock file."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock

from kvlink_rag.errors import StorageError


class WriteLock:
    """For writers: a lock among threads, and one among processes; for a thread, again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process, self._threads, self._processes = self._new()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for the block. Raises `StorageError` where the file cannot be locked."""
        if self._process != os.getpid():  # forked: the others are the parent's
            self._process, self._threads, self._processes = self._new()
        threads, processes = self._threads, self._processes
        with threads:
            try:
                processes.acquire()
            except OSError as error:
                raise StorageError(f"{self.path} cannot be locked for writing: {error}") from error
            except RuntimeError as error:  # filelock's, where this thread holds it elsewhere
                raise StorageError(
                    f"{self.path.parent} is being written by this very thread, through another "
                    "open collection; use one object for a directory"
                ) from error
            try:
                yield
            finally:
                processes.release()

    def _new(self) -> tuple[int, threading.RLock, filelock.BaseFileLock]:
        lock = filelock.FileLock(self.path, thread_local=False, mode=0o600)
        return os.getpid(), threading.RLock(), lock
