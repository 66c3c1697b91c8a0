"""Stretches of work that no fork divides. Knows nothing of what is done in them.

A fork copies the memory of all threads and goes on with one of them: what another one has locked,
in Python, in SQLite's own mutexes or with `flock`, stays locked in the child for ever. So a fork
waits until every thread has left its stretch, and a stretch begins after the fork. Whoever takes
locks within a stretch takes the stretch first.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


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


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
