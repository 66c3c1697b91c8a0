"""What the storage tests run in other processes, and how they are run and killed.

One server process imports everything once and forks a child for each task, so that hundreds of
kills are cheap. A task is a generator: what comes before its `yield` is preparation. `kill_at` is
SIGKILL at one exact line: the child counts the lines it runs in our storage code and in diskcache
and ends itself at the n-th, without any clean-up, as `kill -9` would.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diskcache
import numpy as np
import torch

from kvlink_rag.collection import catalog
from kvlink_rag.collection.catalog import Catalog, Record
from kvlink_rag.disk import atomic_files as files
from kvlink_rag.disk import checked_file as sealed
from kvlink_rag.documents import Document
from kvlink_rag.errors import CatalogError, StorageError
from kvlink_rag.retrieval import vector_index as index
from kvlink_rag.retrieval.vector_index import VectorIndex
from kvlink_rag.snapshots import file_format, store
from kvlink_rag.snapshots.file_format import snapshot_key
from kvlink_rag.snapshots.snapshot import Snapshot
from kvlink_rag.snapshots.store import SnapshotStore

KILLED, SKIPPED = -signal.SIGKILL, 77
MODULES = (files, index, sealed, file_format, diskcache.core)
TRACED = {module.__file__ for module in MODULES}
TRACED |= {
    str(path) for room in (catalog, store) for path in Path(room.__file__).parent.glob("*.py")
}

# Data.


def make_snapshot(number: int, tokens: int = 5, dtype: torch.dtype = torch.float32) -> Snapshot:
    """A snapshot whose contents follow from `number`: [2, 2, tokens, 4]."""
    generator = torch.Generator().manual_seed(number)
    keys, values = torch.randn(2, 2, 2, tokens, 4, generator=generator).to(dtype)
    return Snapshot(keys, values, torch.arange(number, number + tokens))


def ids_of(number: int, tokens: int = 5) -> list[int]:
    return list(range(number, number + tokens))


def key_of(number: int, tokens: int = 5) -> str:
    return snapshot_key("model", ids_of(number, tokens), dtype=torch.float32)


def same(found: Snapshot, expected: Snapshot) -> bool:
    return (
        torch.equal(found.keys, expected.keys)
        and torch.equal(found.values, expected.values)
        and torch.equal(found.token_ids, expected.token_ids)
    )


def record(id: str, text: str, dimension: int = 4) -> Record:
    return Record(
        Document(text, title=f"title of {id}", id=id, metadata={"n": len(text)}),
        embedding=np.full(dimension, len(text), dtype=np.float32),
    )


# Tasks.


def open_store(directory: str) -> Iterator[None]:
    yield
    SnapshotStore(directory).close()


def put(directory: str, numbers: Sequence[int], limit: int | None = None) -> Iterator[None]:
    with SnapshotStore(directory, size_limit=limit) as opened:
        yield
        for number in numbers:
            opened.put(key_of(number), make_snapshot(number))


def delete(directory: str, numbers: Sequence[int]) -> Iterator[None]:
    with SnapshotStore(directory) as opened:
        yield
        for number in numbers:
            opened.delete(key_of(number))


def mend(directory: str) -> Iterator[None]:
    with SnapshotStore(directory) as opened:
        yield
        opened.check(fix=True)


def mixed_load(directory: str, seed: int, changes: int, limit: int) -> Iterator[None]:
    """Put, get and delete at random; fails on any snapshot that is not its key's own."""
    chance = random.Random(seed)
    with SnapshotStore(directory, size_limit=limit) as opened:
        yield
        for _ in range(changes):
            number, what = chance.randrange(12), chance.random()
            if what < 0.3:
                opened.put(key_of(number), make_snapshot(number))
            elif what < 0.4:
                opened.delete(key_of(number))
            found = opened.get(key_of(number), ids_of(number))
            if found is not None and not same(found, make_snapshot(number)):
                raise AssertionError(f"another snapshot under the key of {number}")
        if opened.stats().corrupt:
            raise AssertionError("a snapshot was seen half written")


def open_catalog(path: str) -> Iterator[None]:
    yield
    Catalog.open(path, create=True).close()


def change_catalog(path: str, acknowledged: str) -> Iterator[None]:
    """Three changes; each is noted in the file `acknowledged` once it has returned."""
    opened = Catalog.open(path, create=True)
    yield
    changes: list[Callable[[], object]] = [
        lambda: opened.upsert([record("a", "first"), record("b", "first")]),
        lambda: opened.upsert([record("a", "second one"), record("c", "second one")]),
        lambda: opened.delete(["b", "c"]),
    ]
    for number, change in enumerate(changes, start=1):
        change()
        Path(acknowledged).write_text(str(number))


def add_documents(path: str, name: str, count: int) -> Iterator[None]:
    """`count` additions, each of one document of its own."""
    with Catalog.open(path, create=True) as opened:
        yield
        for number in range(count):
            opened.upsert([record(f"{name}{number}", "x" * (number + 1))])


def save_index(path: str, count: int, version: int) -> Iterator[None]:
    made = VectorIndex(3)
    made.add(range(count), np.arange(3 * count, dtype=np.float32).reshape(count, 3))
    yield
    made.save(Path(path), version)


def _mount(*arguments: str) -> None:
    """Mount something that only this process sees; ends it where that is not allowed."""
    new_mounts = 0x20000  # CLONE_NEWNS
    if ctypes.CDLL(None).unshare(new_mounts) != 0:
        os._exit(SKIPPED)
    for command in (["mount", "--make-rprivate", "/"], ["mount", *arguments]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            os._exit(SKIPPED)


def read_only(directory: str) -> Iterator[None]:
    """Read a collection that holds snapshot 1 and document "a" where nobody can write."""
    yield
    _mount("--bind", directory, directory)
    if subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=False).returncode:
        os._exit(SKIPPED)
    with SnapshotStore(f"{directory}/store") as opened:
        found = opened.get(key_of(1), ids_of(1))
        assert found is not None
        assert same(found, make_snapshot(1))
        assert opened.get(key_of(2), ids_of(2)) is None
        assert opened.check() == []
        assert len(opened) == 1
        both = opened.get_many({key_of(1): ids_of(1), key_of(2): ids_of(2)})
        assert [both[key_of(n)] is None for n in (1, 2)] == [False, True]
        for change in (
            lambda: opened.put(key_of(2), make_snapshot(2)),
            lambda: opened.delete(key_of(1)),
        ):
            _refused(change, StorageError, "[Rr]ead-only file system")
    with Catalog.open(f"{directory}/catalog.db", create=True) as held:
        assert [entry.id for entry in held.iterate()] == ["a"]
        assert held.check() == []
        _refused(lambda: held.upsert([record("b", "x")]), CatalogError, "readonly")
    index = VectorIndex(3)
    _refused(lambda: index.save(Path(directory, "index"), 1), OSError, "Read-only")


def full_disk(directory: str) -> Iterator[None]:
    """Write until nothing fits any more: what was acknowledged is there, the rest is not."""
    yield
    _mount("-t", "tmpfs", "-o", "size=900k", "tmpfs", directory)
    puts, changes = set(), set()
    with (
        SnapshotStore(f"{directory}/store") as opened,
        Catalog.open(f"{directory}/catalog.db", create=True) as held,
    ):
        for number in range(60):
            with contextlib.suppress(StorageError):
                opened.put(key_of(number), make_snapshot(number))
                puts.add(number)
            with contextlib.suppress(CatalogError):
                held.upsert([record(f"{number}", "x" * 2000)])
                changes.add(f"{number}")
        assert 5 < len(puts) < 60
        assert 5 < len(changes) < 60
        found = {n for n in range(60) if opened.get(key_of(n), ids_of(n)) is not None}
        assert found == puts
        assert {entry.id for entry in held.iterate()} == changes
        assert opened.check() == []
        assert held.check() == []


def _refused(action: Callable[[], object], error: type[Exception], words: str) -> None:
    message = "not refused"
    try:
        action()
    except error as raised:
        message = str(raised)
    assert re.search(words, message), message


def kill_at(line: int, name: str, *args: Any) -> Iterator[None]:
    """Run the task `name` up to the `line`-th traced line after its preparation."""
    task = globals()[name](*args)
    next(task)
    yield
    left = line

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        left -= event == "line"
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    for _ in task:
        pass
    sys.settrace(None)
    time.sleep(0)


def perform(task: Iterator[None]) -> None:
    for _ in task:
        pass


# The server and its client.


def start(name: str, *args: Any) -> int:
    """Start the task `name` in a process of its own; its process id."""
    return _ask("start", name, *args)


def join(process: int) -> int:
    """Wait for a process: 0, 1 for an error, or minus the signal that ended it."""
    return _ask("join", process)


def run(name: str, *args: Any) -> int:
    return join(start(name, *args))


def is_running(process: int) -> bool:
    return bool(_ask("is_running", process))


def _ask(*request: Any) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends when this process does, with its standard input."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _serve() -> None:
    ended: dict[int, int] = {}
    for line in sys.stdin:
        what, *args = json.loads(line)
        if what == "start":
            answer = _fork(*args)
        elif what == "join":
            answer = ended[args[0]] if args[0] in ended else _wait(args[0], 0)[1]
        else:
            process, code = _wait(args[0], os.WNOHANG)
            if process:
                ended[process] = code
            answer = int(not process)
        print(answer, flush=True)


def _fork(name: str, *args: Any) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        perform(globals()[name](*args))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int, flags: int) -> tuple[int, int]:
    found, status = os.waitpid(process, flags)
    return found, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    _serve()
