"""Generators of slow items: for an event loop that must not wait for them, and for the end.

Knows nothing of what the items are.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

Item = TypeVar("Item")
P = ParamSpec("P")
_DONE: Final = object()
_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def closed_at_exit(
    make: Callable[P, Generator[Item, None, None]],
) -> Callable[P, Generator[Item, None, None]]:
    """`make`, whose generators are closed before the interpreter goes, if nobody has done so.

    One that is closed later, among modules that are gone already, prints a traceback; LlamaIndex's
    own generators round it do so too.
    """

    @wraps(make)
    def made(*arguments: P.args, **named: P.kwargs) -> Generator[Item, None, None]:
        items = make(*arguments, **named)
        _open.add(items)
        return items

    return made


@atexit.register
def _close_all() -> None:
    for items in list(_open):
        with contextlib.suppress(ValueError):  # it is at work in another thread
            items.close()


async def in_thread(items: Generator[Item, None, None]) -> AsyncGenerator[Item, None]:
    """The items of `items`, each made in a worker thread.

    Whoever stops early (a cancelled task, `aclose`) stops the generator after the item it is at.
    """
    lock = threading.Lock()

    def step() -> Item | object:
        with lock:
            return next(items, _DONE)

    def close() -> None:
        with lock:  # a cancelled step may still be running
            items.close()

    try:
        while (item := await asyncio.to_thread(step)) is not _DONE:
            yield item  # type: ignore[misc]
    finally:
        asyncio.get_running_loop().run_in_executor(None, close)
