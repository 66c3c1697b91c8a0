"""Work in threads, bounded: so many at once, so many waiting, each for so long.

    asyncio handler → Job → a thread runs its generator → items → the handler

A handler that leaves ends its generator between two items. Knows generators; knows no HTTP and no
model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

from .refusals import Refused

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes on.

    at_once: answers computed side by side. waiting: requests that wait for their turn. patience:
    seconds that one waits. seconds: of one request's work. body, upload: bytes of a request and of
    a file. tokens: the most of an answer. texts: of one embeddings request.
    """

    at_once: int = 8
    waiting: int = 64
    patience: float = 60.0
    seconds: float = 600.0
    body: int = 4 << 20
    upload: int = 64 << 20
    tokens: int = 4096
    texts: int = 2048


class Runner:
    """The threads that answer. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = self.queued = 0
        self.stopping = False
        self._mean = 1.0  # seconds of a request, of the latest ones
        self._pool = ThreadPoolExecutor(limits.at_once, thread_name_prefix="kvlink-serve")

    def start(self, make: Callable[[], Generator[Item, None, None]]) -> Job[Item]:
        """Queue the generator of `make`, which is called in a thread.

        Raises `Refused`: 429 where the queue is full, 503 where the server stops.
        """
        if self.stopping:
            raise Refused(503, "the server is stopping", code="stopping", retry_after=5)
        if self.queued >= self.limits.waiting + max(0, self.limits.at_once - self.running):
            raise Refused(
                429,
                f"{self.queued} requests wait already; try again later",
                code="rate_limit_exceeded",
                retry_after=self._expected_wait(),
            )
        self.queued += 1
        job = Job[Item](self, make)
        self._pool.submit(job.run)
        return job

    async def call(self, work: Callable[[], Item]) -> Item:
        """The result of `work`, run in turn with everything else."""

        def once() -> Generator[Item, None, None]:
            yield work()

        async with self.start(once) as job:
            return await job.first()

    def close(self) -> None:
        """Let what runs finish."""
        self.stopping = True
        self._pool.shutdown()

    def began(self, waited: float) -> None:
        """A thread took a job that has waited for so many seconds. Raises `Refused`."""
        if waited > self.limits.patience:
            raise Refused(
                503,
                f"waited {waited:.0f} s for a turn; try again later",
                code="overloaded",
                retry_after=self._expected_wait(),
            )

    def counted(self, running: int, seconds: float | None = None) -> None:
        """A job began (1) or ended (-1, after so many seconds), told in the event loop."""
        self.running += running
        self.queued -= running == 1
        if seconds is not None:
            self._mean += 0.2 * (seconds - self._mean)

    def _expected_wait(self) -> int:
        return max(1, min(60, round(self._mean * self.queued / self.limits.at_once)))


class _End:
    """Behind the last item."""


class Job(Generic[Item]):
    """One generator in a thread; `async with` it, so that it ends when its reader does."""

    def __init__(self, runner: Runner, make: Callable[[], Generator[Item, None, None]]) -> None:
        self._runner, self._make = runner, make
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | _End | Exception] = asyncio.Queue()
        self._left = threading.Event()
        self._asked = time.monotonic()
        self.ended = False

    async def __aenter__(self) -> Job[Item]:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Nobody reads on; the generator is closed at its next item."""
        self._left.set()

    async def first(self) -> Item:
        """The next item of a generator that has one."""
        return await anext(self)

    def __aiter__(self) -> Job[Item]:
        return self

    async def __anext__(self) -> Item:
        """The next item as it comes. Raises what the work raises."""
        item = await self._items.get()
        if isinstance(item, _End):
            self.ended = True
            raise StopAsyncIteration
        if isinstance(item, Exception):
            self.ended = True
            raise item
        return item

    def run(self) -> None:
        """The generator from beginning to end, in this thread."""
        start = time.monotonic()
        self._tell(self._runner.counted, 1)
        try:
            if not self._left.is_set():
                self._runner.began(start - self._asked)
                self._run(start)
        except Exception as error:
            self._tell(self._items.put_nowait, error)
        finally:
            self._tell(self._items.put_nowait, _End())
            self._tell(self._runner.counted, -1, time.monotonic() - start)

    def _run(self, start: float) -> None:
        most = self._runner.limits.seconds
        with closing(self._make()) as items:
            for item in items:
                if self._left.is_set():
                    return
                self._tell(self._items.put_nowait, item)
                if time.monotonic() - start > most:
                    raise Refused(503, f"stopped after {most:g} s", code="timeout")

    def _tell(self, what: Callable[..., object], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(what, *arguments)
