"""Loads that are under way beside vLLM's steps: which prompts, and how they ended.

Every load that was begun is reported once, as done or as failed, whatever happens: vLLM keeps the
pages of a request until then. Knows threads; knows no vLLM.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

AT_ONCE = 2  # snapshots of one prompt are read while another one is computed


@dataclass(slots=True)
class Ended:
    """Ids of requests whose loads have ended since the last look; failed: of those, the failed."""

    all: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


class Loading:
    """A few threads that load."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vllm-kvlink")
        self._changed = threading.Condition()
        self._under_way = 0
        self._ended = Ended()

    def begin(self, request: str, work: Callable[[], None]) -> None:
        """Run `work` for a request."""
        with self._changed:
            self._under_way += 1
        self._pool.submit(self._run, request, work)

    def wait(self, seconds: float) -> None:
        """Until a load has ended, if any is under way, and at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended.all or not self._under_way, seconds)

    def ended(self) -> Ended:
        """What has ended since this was asked last."""
        with self._changed:
            ended, self._ended = self._ended, Ended()
            return ended

    def close(self) -> None:
        """Wait for what is under way, and drop the rest: nobody asks any more."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, request: str, work: Callable[[], None]) -> None:
        failed = True
        try:
            work()
            failed = False
        except Exception as error:  # of this request; vLLM ends it and goes on
            logger.error("the prompt of request %s was not loaded: %s", request, error)
        finally:
            with self._changed:
                self._under_way -= 1
                self._ended.all.add(request)
                if failed:
                    self._ended.failed.add(request)
                self._changed.notify_all()
