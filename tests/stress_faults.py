"""Damage, errors and quotas at random places, and what a collection makes of them.

    python tests/stress_faults.py --cases 1000 --seed 0

Three kinds of cases, each on a fresh copy of one collection:

damage  A file of the collection (any) has a bit flipped, is cut off, gets zeros, random bytes or
        more bytes, or is removed. Where the file is derived, nothing is lost, searches and answers
        are right, what was found is logged, and `check(fix=True)` mends it. Where it is the
        catalog, every call is right or an error of ours, and `check` tells what is lost or wrong.
errors  A system call of ours fails (EIO, ENOSPC, EACCES, EMFILE) at a random place of a change or
        a question, once or from then on. The change is made, or refused with an error of ours and
        not made by half; a question is answered right.
quota   A child may write no byte beyond a random size of any file (RLIMIT_FSIZE), which SQLite
        meets too. As above.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import stress_crash
import trust
from stress_crash import BATCH, TRACED, Change, ended, fork
from trust import NAMES, Truth, as_documents, document_of, open_tiny

import kvlink_rag.collection.adding
import kvlink_rag.disk.atomic_files
from kvlink_rag.errors import KVLinkError

SECONDS = 120  # for one case
CODES = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE)
CALLS = ("open", "link", "replace", "rename", "fsync", "unlink", "utime", "lstat", "scandir")
TRACED = TRACED | {str(Path(os.__file__).with_name("pathlib.py"))}


def hung(*_: object) -> None:
    """A case that takes this long goes round and round."""
    raise TimeoutError(f"it took more than {SECONDS} s")


class Heard(logging.Handler):
    """The log lines of our logger tree."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


# Damage.


def hurt(path: Path, chance: random.Random) -> str:
    """Damage one file in one way; which."""
    data = bytearray(path.read_bytes())
    how = chance.choice(["flip", "flip", "cut", "zeros", "noise", "longer", "remove"])
    at = chance.randrange(max(1, len(data)))
    stop = min(len(data), at + chance.choice([1, 16, 512, 4096]))
    if how == "remove":
        path.unlink()
        return how
    if how == "flip" and data:
        data[at] ^= 1 << chance.randrange(8)
    elif how == "cut":
        data = data[:at]
    elif how == "zeros":
        data[at:stop] = bytes(stop - at)
    elif how == "noise":
        data[at:stop] = chance.randbytes(stop - at)
    else:
        data += chance.randbytes(chance.choice([1, 100, 5000]))
    path.write_bytes(data)
    return how


def damage_case(directory: Path, truth: Truth, chance: random.Random, heard: Heard) -> list[str]:
    files = {
        "catalog": [directory / "catalog.sqlite"],
        "index": [directory / "index.faiss"],
        "table": [directory / "snapshots" / "cache.db"],
        "snapshot": sorted((directory / "snapshots").rglob("*.safetensors")),
        "lock": [directory / "write.lock", directory / "snapshots" / "lock"],
    }
    what = chance.choices(list(files), weights=[5, 3, 4, 6, 1])[0]
    path = chance.choice(files[what])
    before = path.read_bytes()
    how = hurt(path, chance)
    changed = not path.exists() or path.read_bytes() != before
    look = look_at_catalog if what == "catalog" else look_at_derived
    problems = look(directory, truth, chance)
    silent = changed and what in ("index", "snapshot") and how != "remove" and not heard.lines
    if silent:
        problems.append("it was not logged")
    return [f"{what}, {how} {path.name}: {problem}" for problem in problems]


def look_at_derived(directory: Path, truth: Truth, chance: random.Random) -> list[str]:
    with open_tiny(directory) as rag:
        question = f"{chance.choice(NAMES)}?"
        rag.ask(question, k=len(truth), max_new_tokens=1)  # reads every snapshot
        return trust.broken(rag, [truth], chance)


def look_at_catalog(directory: Path, truth: Truth, chance: random.Random) -> list[str]:
    """Every call is right or an error of ours; whatever differs, `check` tells."""
    failed: list[KVLinkError] = []
    try:
        rag = open_tiny(directory)
    except KVLinkError:
        return []
    with rag:
        found = attempt(lambda: trust.held(rag), failed)
        told = attempt(rag.check, failed)
        wrong = attempt(lambda: trust.wrong_answers(rag, chance), failed) or []
        attempt(lambda: rag.stats(), failed)
        attempt(lambda: rag.check(fix=True), failed)
        missed = found != truth and not told and not failed
        strange = {id: row for id, row in (found or {}).items() if id in truth and row != truth[id]}
        return [
            *wrong,
            *(["something is lost and nothing tells"] if missed else []),
            *([f"other content: {strange}"] if strange else []),
        ]


def attempt(action: Callable[[], Any], failed: list[KVLinkError]) -> Any:
    try:
        return action()
    except KVLinkError as error:
        failed.append(error)
        return None


# Errors.


@contextmanager
def failing(chance: random.Random, calls: int) -> Iterator[list[str]]:
    """Let one of the next `calls` calls of ours into the system fail, or all from it on."""
    left, code, once = chance.randrange(calls), chance.choice(CODES), chance.random() < 0.6
    struck: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            caller = sys._getframe(1 + (name == "write")).f_code.co_filename
            if caller in TRACED and not (once and struck):
                left -= 1
                if left < 0:
                    struck.append(name)
                    raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in CALLS}
    writing = wrapped("write", FileIO.write)
    failing_file = type("FileIO", (FileIO,), {"write": lambda self, data: writing(self, data)})
    try:
        for name in CALLS:
            setattr(os, name, wrapped(name, real[name]))
        vars(kvlink_rag.disk.atomic_files)["FileIO"] = failing_file
        yield struck
    finally:
        for name in CALLS:
            setattr(os, name, real[name])
        vars(kvlink_rag.disk.atomic_files)["FileIO"] = FileIO


def error_case(
    directory: Path, truth: Truth, chance: random.Random, struck: Counter[str]
) -> list[str]:
    change = a_change(truth, chance)
    if change.name == "ask":
        return question_case(directory, truth, chance, struck)
    try:
        with failing(chance, 25) as found:
            stress_crash.perform(change, directory, None, (0, ""))
        made = True
    except KVLinkError:
        made = False
    struck.update(found[:1])
    allowed = change.states(truth)
    with open_tiny(directory) as rag:
        problems = trust.broken(rag, allowed[-1:] if made else [truth, *allowed], chance)
    return [f"{change.name} with {found[:1]}: {problem}" for problem in problems]


def question_case(
    directory: Path, truth: Truth, chance: random.Random, struck: Counter[str]
) -> list[str]:
    """A question needs no file but the catalog: whatever else fails, it is answered right."""
    with open_tiny(directory) as rag:
        for path in (directory / "snapshots").rglob("*.safetensors"):
            if chance.random() < 0.3:
                path.unlink()  # encoded again, and stored where that can be
        with failing(chance, 15) as found:
            problems = trust.wrong_answers(rag, chance)
        struck.update(found[:1])
        problems += trust.broken(rag, [truth], chance)
    return [f"a question with {found[:1]}: {problem}" for problem in problems]


def a_change(truth: Truth, chance: random.Random) -> Change:
    kind = chance.choice(["add", "update", "delete", "save", "ask", "check"])
    some = chance.sample(sorted(truth), chance.randrange(1, 5))
    if kind in ("add", "update"):
        ids = some if kind == "update" else [*some[:1], "new one", "another"]
        return Change(kind, [document_of(chance, id) for id in ids])
    if kind == "ask":
        return Change(kind, ids=[f"{chance.choice(NAMES)}?"])
    return Change(kind, ids=some if kind == "delete" else [])


# Quota.


def quota_case(directory: Path, truth: Truth, chance: random.Random) -> list[str]:
    change, most = a_change(truth, chance), chance.choice([0, 1000, 9000, 30_000, 100_000])
    made, refused = 3, 4

    def task() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        try:
            stress_crash.perform(change, directory, None, (0, ""))
        except KVLinkError:
            os._exit(refused)
        os._exit(made)

    code = ended(fork(task))
    if code not in (made, refused):
        return [f"{change.name} with a quota of {most}: the child ended with {code}"]
    allowed = change.states(truth)
    with open_tiny(directory) as rag:
        problems = trust.broken(rag, allowed[-1:] if code == made else [truth, *allowed], chance)
    return [f"{change.name} with a quota of {most}: {problem}" for problem in problems]


def template(directory: Path) -> Truth:
    """A collection with snapshots, an index file and a past."""
    chance = random.Random(7)
    with open_tiny(directory) as rag:
        rag.add(as_documents([document_of(chance, name.lower()) for name in NAMES]))
        rag.add(as_documents([document_of(chance, name.lower()) for name in NAMES[:4]]))
        rag.delete([NAMES[-1].lower()])
        return trust.held(rag)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of damage; a third of each other")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    chance, heard, struck = random.Random(arguments.seed), Heard(), Counter[str]()
    logger = logging.getLogger("kvlink_rag")
    logger.addHandler(heard)
    logger.propagate = False
    kvlink_rag.collection.adding.BATCH = BATCH
    signal.signal(signal.SIGALRM, hung)
    cases = ["damage"] * arguments.cases
    cases += ["errors"] * (arguments.cases // 3) + ["quota"] * (arguments.cases // 3)
    chance.shuffle(cases)
    begun, failures = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as root:
        truth = template(Path(root, "template"))
        for number, case in enumerate(cases):
            directory = Path(root, "case")
            shutil.copytree(Path(root, "template"), directory)
            heard.lines.clear()
            signal.alarm(SECONDS)
            try:
                if case == "damage":
                    problems = damage_case(directory, truth, chance, heard)
                elif case == "errors":
                    problems = error_case(directory, truth, chance, struck)
                else:
                    problems = quota_case(directory, truth, chance)
            except Exception as error:
                logging.getLogger("stress").exception("case %d", number)
                problems = [f"{type(error).__name__}: {error}"]
            finally:
                signal.alarm(0)
            for problem in problems:
                print(f"FAILED case {number} ({case}): {problem}")
            failures += bool(problems)
            shutil.rmtree(directory)
            if failures > 20:
                break
    report = {
        "cases": dict(Counter(cases[: number + 1])),
        "calls_that_failed": dict(sorted(struck.items())),
        "failures": failures,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(report))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
