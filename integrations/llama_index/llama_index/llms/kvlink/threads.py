"""Iterators of slow items, for an event loop that must not wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from typing import Final, TypeVar

Item = TypeVar("Item")
_DONE: Final = object()


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
