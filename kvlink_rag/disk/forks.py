"""Stretches of work that no fork divides, and locks that a fork leaves behind. Knows no work.

A fork copies the memory of all threads and goes on with one of them: what another one has locked,
in Python, in SQLite's own mutexes or with `flock`, stays locked in the child for ever. So a fork
waits until every thread has left its stretch, and a stretch begins after the fork. Whoever takes
locks within a stretch takes the stretch first. Where what a lock guards may be found half done (it
is only kept in memory, and can be made again), a lock that is new in the child is enough.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol


class _Gate:
    """How many stretches are under way, and whether a fork waits for them."""

    def __init__(self, inside: int = 0) -> None:
        self.changed = threading.Condition()
        self.inside = inside
        self.forking = False


_gate = _Gate()
_own = threading.local()  # .count: the stretches of this thread, one within the other


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """A stretch that no fork of this process divides; a fork by this very thread does not wait."""
    with _gate.changed:
        while _gate.forking and not _own_count():
            _gate.changed.wait()
        _gate.inside += 1
        _own.count = _own_count() + 1
    try:
        yield
    finally:
        with _gate.changed:
            _gate.inside -= 1
            _own.count -= 1
            _gate.changed.notify_all()


class ForkSafeLock:
    """A lock that a thread may take again; in a forked child only the forking thread holds it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), self._depth + 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        self._owner = self._owner if self._depth else None
        self._lock.release()

    def leave_behind(self) -> None:
        """In a child: forget what another thread of the parent held."""
        if self._owner not in (None, threading.get_ident()):
            self._lock, self._owner, self._depth = threading.RLock(), None, 0


class Renewed(Protocol):
    """What a fork leaves half done."""

    def leave_behind(self) -> None:
        """In a child: forget what other threads of the parent did with it."""
        ...


_locks: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renewed_in_child(thing: Renewed) -> None:
    """Have `thing` told in each forked child, for as long as it lives."""
    _locks.add(thing)


def _own_count() -> int:
    count: int = getattr(_own, "count", 0)
    return count


def _before() -> None:
    """Wait for the stretches of other threads, and let none begin."""
    _gate.changed.acquire()
    while _gate.inside != _own_count():
        _gate.forking = True
        _gate.changed.wait()


def _in_parent() -> None:
    _gate.forking = False
    _gate.changed.notify_all()
    _gate.changed.release()


def _in_child() -> None:
    global _gate
    _gate = _Gate(_own_count())
    for lock in _locks:
        lock.leave_behind()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
