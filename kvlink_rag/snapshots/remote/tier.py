"""The tier behind the store: read through, written behind, and never in an answer's way.

    fetch   what is asked for, side by side, within the time limit; a fault is a miss
    offer   a key is queued; one thread reads its file from the store and writes it there, if some
            document still has it, and takes it back if none has it any more by then
    erase   before all that is queued to be written, of which that key goes; never dropped

After a few faults in a row nothing is asked for a while. What is to be erased is written down until
it is, so that neither a server that is gone nor a kill brings it back. Knows keys and bytes; knows
no tensors and no documents.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from kvlink_rag.disk.forks import renewed_in_child
from kvlink_rag.errors import ConfigError, SnapshotCorrupt, StorageError, first_line

from .places import Place, TooLarge, place_of
from .sealing import SEALED, seal, unseal

SECRET = "KVLINK_REMOTE_SECRET"  # the environment's variable
ERASURES = "remote-erasures.txt"  # in a collection that has been opened with a tier
TIMEOUT = 0.5  # seconds that an answer waits for the tier, at most
LEAST_SECRET = 16  # characters
READERS = 8  # values that are read side by side
HANGING = 32  # reads that are under way, those that never end among them
QUEUED = 1024  # snapshots that may wait to be written; more are not offered
FAULTS, PAUSE = 3, 10.0  # so many faults in a row, and seconds without a call
CLOSING = 5.0  # seconds that closing waits for the queue

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """What a tier has seen since it was opened.

    hits, misses: keys asked for. written, erased: values. dropped: not offered, for the queue was
    full or the tier not to be reached. refused: values that were not what they claimed to be.
    faults: calls that failed or took too long. resting: whether it is left alone for now.
    """

    hits: int = 0
    misses: int = 0
    written: int = 0
    erased: int = 0
    dropped: int = 0
    refused: int = 0
    faults: int = 0
    resting: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def open_remote(
    url: str,
    namespace: str,
    directory: Path,
    read: Read,
    wanted: Wanted = lambda key: True,
    *,
    timeout: float = TIMEOUT,
) -> RemoteTier:
    """The tier at `url`, whose query may name `namespace`, `timeout` (seconds) and `unsigned=1`.

    namespace: where the URL names none ("": it must). directory: where what is to be erased is
    written down. read: the file of a key in the store. wanted: whether a document has it. timeout:
    where the URL names none. Raises `ConfigError`, which shows nothing of the URL that may be a
    password, and `MissingExtra`.
    """
    parts = _parts(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    named = query.pop("namespace", namespace)
    if not named:
        raise ConfigError(
            "found a tier without a namespace, which no collection is here to give; add "
            "?namespace=NAME to its URL, and open the collection with the same"
        )
    if not _NAME.fullmatch(named) or set(named) == {"."}:
        raise ConfigError(
            f"found the namespace {named!r}, expected up to 100 letters, digits, '.', '_' and '-'"
        )
    timeout = _seconds(query.pop("timeout", str(timeout)))
    unsigned = query.pop("unsigned", "0") == "1"
    secret = os.environ.get(SECRET, "")
    if not unsigned and len(secret) < LEAST_SECRET:
        raise ConfigError(
            "a remote tier needs a secret, the same on all machines that share it: set "
            f"{SECRET} to {LEAST_SECRET} characters or more (such as of: openssl rand -hex 32), or "
            "say unsigned=1 in its URL where nobody else can write there"
        )
    place = place_of(parts._replace(query=urlencode(query)), timeout)
    signed = b"" if unsigned else secret.encode()
    return RemoteTier(
        *(place, named, signed, read, wanted),
        timeout=timeout,
        erasures=directory / ERASURES,
    )


def _parts(url: str) -> SplitResult:
    """The URL's parts, its port read once, so that what comes later cannot fail on it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            "the tier's URL cannot be read, expected such as redis://:PASSWORD@host:6379/0; write "
            "the characters / ? # @ : of a password as %2F %3F %23 %40 %3A"
        ) from None
    return parts


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 3600:
        raise ConfigError(f"found timeout={text!r} in the remote tier's URL, expected seconds")
    return found


Read = Callable[[str], bytes | None]
Wanted = Callable[[str], bool]


class RemoteTier:
    """Snapshots' files by key at a `Place`. For any number of threads.

    secret: signs values; empty: nothing is signed. read: the file of a key, asked for when it is
    its turn to be written; wanted: whether it is to be there at all. clock: seconds, for the pause
    after faults.
    """

    def __init__(
        self,
        place: Place,
        namespace: str,
        secret: bytes,
        read: Read,
        wanted: Wanted = lambda key: True,
        *,
        timeout: float = TIMEOUT,
        erasures: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._namespace, self._secret = place, namespace, secret
        self._read, self._wanted = read, wanted
        self._timeout, self._clock, self._erasures = timeout, clock, erasures
        self._counts: Counter[str] = Counter()
        self._in_a_row, self._resting_until = 0, -1.0
        self._closed = False
        self.leave_behind()
        renewed_in_child(self)
        self._to_erase = dict.fromkeys(_written_down(erasures))  # sooner or later
        if self._to_erase:
            self._again()
        elif erasures is not None:
            _keep_file(erasures)

    def leave_behind(self) -> None:
        """Without threads and queues: at first, and in a forked child, whose parent has them."""
        self._offered: dict[str, None] = {}  # keys, in order
        self._erasing: dict[str, None] = {}
        self._busy = False
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._readers = threading.Semaphore(HANGING)

    def fetch(self, keys: Mapping[str, int]) -> dict[str, bytes]:
        """The files of those keys that are there, checked to be signed under that key.

        keys: with the most bytes that each file may have.
        """
        wanted = list(keys)
        if not wanted or self._rests():
            return {}
        calls = [partial(self._place.get, self._name(k), keys[k] + SEALED) for k in wanted]
        values = self._side_by_side(calls)
        found = {}
        for key, value in zip(wanted, values, strict=True):
            if isinstance(value, TooLarge):
                self.refuse(key, value)
                continue
            if isinstance(value, BaseException):
                self._fault(f"{key} was not read", value)
                continue
            self._well()
            if value is None:
                self._count("misses")
                continue
            try:
                found[key] = unseal(self._secret, self._name(key), value)
            except SnapshotCorrupt as error:
                self.refuse(key, error)
        self._count("hits", len(found))
        return found

    def refuse(self, key: str, error: Exception) -> None:
        """Count a value that is not to be used, and say why."""
        self._count("refused")
        logger.warning("a value of the remote tier is not used (%s): %s", key, error)

    def offer(self, key: str) -> None:
        """Queue the file of `key`, to be written when it is its turn, if there is room."""
        with self._changed:
            if len(self._offered) < QUEUED and not self._closed:
                self._offered[key] = None
                self._wake()
            else:
                self._count("dropped")

    def write(self, key: str) -> None:
        """Write the file of `key` now, for who can wait.

        Raises `StorageError` where the store has none, and what the place's client raises.
        """
        if (file := self._read(key)) is None:
            raise StorageError(f"the store holds no snapshot {key} to write to the remote tier")
        self._put(key, file)

    def erase(self, key: str) -> None:
        """Queue the removal of `key`; what was queued of it before goes."""
        with self._changed:
            self._offered.pop(key, None)
            self._to_erase[key] = self._erasing[key] = None
            if self._erasures is not None:
                _note(self._erasures, key)
            self._wake()

    def flush(self, seconds: float) -> bool:
        """Wait until all that is queued was tried, at most so long; whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waits() or self._busy), seconds)

    def close(self) -> None:
        """Try what is queued, for a few seconds; what is left to be erased is tried next time."""
        if not self._rests():
            self.flush(CLOSING)
        with self._changed:
            self._closed = True
            self._count("dropped", len(self._offered))
            self._offered.clear()
            self._erasing.clear()
            self._changed.notify_all()
            left = len(self._to_erase)
        if left:
            logger.warning(
                "%d snapshots are still to be erased in the remote tier; that is tried again when "
                "this collection is opened with it",
                left,
            )

    def stats(self) -> RemoteStats:
        """Counts so far."""
        with self._changed:
            return RemoteStats(**self._counts, resting=self._rests())

    # The writer

    def _waits(self) -> bool:
        return bool(self._erasing or self._offered)

    def _wake(self) -> None:
        """Have what waits done; under the lock."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="kvlink-remote", daemon=True)
            self._writer.start()
        self._changed.notify_all()

    def _write(self) -> None:
        """What the thread does: one thing after the other until the tier is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waits() or self._closed)
                if not self._waits():
                    return
                erases = bool(self._erasing)
                queue = self._erasing if erases else self._offered
                key = next(iter(queue))
                del queue[key]
                self._busy = True
            try:
                self._do(key, erases=erases)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _do(self, key: str, *, erases: bool) -> None:
        if self._rests():
            self._count("dropped", 0 if erases else 1)  # what is to be erased stays written down
            return
        try:
            if erases:
                self._place.delete(self._name(key))
                self._erased(key)
            elif self._wanted(key) and (file := self._read(key)) is not None:
                self._put(key, file)
                if not self._wanted(key):  # deleted meanwhile, perhaps by another process
                    self._place.delete(self._name(key))
        except Exception as error:  # whatever a client raises
            self._fault(f"{key} was not {'erased' if erases else 'written'}", error)
            return
        self._well()
        self._again()

    def _put(self, key: str, file: bytes) -> None:
        self._place.put(self._name(key), seal(self._secret, self._name(key), file))
        self._count("written")

    def _erased(self, key: str) -> None:
        with self._changed:
            self._to_erase.pop(key, None)
            if not self._to_erase and self._erasures is not None:
                _keep_file(self._erasures)
        self._count("erased")

    def _again(self) -> None:
        """The tier answers: what could not be erased before is tried again."""
        with self._changed:
            self._erasing |= self._to_erase
            if self._erasing:
                self._wake()

    def _side_by_side(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each call gives, or raises; `TimeoutError` for those not done within the limit.

        In daemon threads, a bounded number of them: one that hangs keeps neither the caller nor the
        process, and not the memory of one thread after the other.
        """
        late = TimeoutError(f"no answer within {self._timeout:g} s")
        results: list[Any] = [late] * len(calls)
        left, done, readers = deque(enumerate(calls)), threading.Semaphore(0), self._readers

        def work() -> None:
            try:
                while left:
                    with contextlib.suppress(IndexError):  # another one took the last
                        place, call = left.popleft()
                        results[place] = _outcome(call)
                        done.release()
            finally:
                readers.release()

        for _ in range(min(READERS, len(calls))):
            if readers.acquire(blocking=False):
                threading.Thread(target=work, name="kvlink-remote-read", daemon=True).start()
        deadline = time.monotonic() + self._timeout
        for _ in calls:
            if not done.acquire(timeout=max(0.0, deadline - time.monotonic())):
                left.clear()
                break
        return list(results)

    # Faults

    def _rests(self) -> bool:
        with self._changed:
            return self._clock() < self._resting_until

    def _well(self) -> None:
        with self._changed:
            self._in_a_row = 0

    def _fault(self, what: str, error: BaseException) -> None:
        with self._changed:
            self._counts["faults"] += 1
            self._in_a_row += 1
            rests = self._in_a_row >= FAULTS
            if rests:
                self._in_a_row = 0
                self._resting_until = self._clock() + PAUSE
        logger.warning(
            "the remote tier failed: %s (%s: %s)%s",
            what,
            type(error).__name__,
            first_line(error),
            f"; it is left alone for {PAUSE:g} seconds" if rests else "",
        )

    def _count(self, name: str, number: int = 1) -> None:
        with self._changed:
            self._counts[name] += number

    def _name(self, key: str) -> str:
        return f"{self._namespace}/{key[:2]}/{key}"


def note_erasure(directory: Path, key: str) -> None:
    """Where a tier is known by this collection, but not open: erase `key` there the next time."""
    if (path := directory / ERASURES).is_file():
        _note(path, key)


def _note(path: Path, key: str) -> None:
    with contextlib.suppress(OSError), path.open("a", encoding="ascii") as file:
        file.write(f"{key}\n")


def _keep_file(path: Path) -> None:
    """Empty: the collection knows a tier, and nothing is left to be erased there."""
    with contextlib.suppress(OSError):
        path.write_text("", "ascii")


def _written_down(path: Path | None) -> list[str]:
    try:
        return path.read_text("ascii").split() if path is not None else []
    except (OSError, UnicodeDecodeError):
        return []


def _outcome(call: Callable[[], Any]) -> Any:
    """What it gives, or the exception that it raises, whatever a client raises."""
    try:
        return call()
    except Exception as error:
        return error
