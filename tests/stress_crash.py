"""Kill -9 at random points of everything that writes, and look at what is left.

    python tests/stress_crash.py --kills 300 --seed 0

One collection lives through all kills of a run, and a second one with a size limit, so that damage
would add up. Each child makes a few changes and notes in a file which were acknowledged. Half of
the kills strike at a random line of our code or of our libraries' storage code (the child ends
itself there; a line that runs once is as likely as any), half after a random time (the parent
kills it, in C code too). After each: the directory opens; every acknowledged change is there, and
of the one under way all of its batches that were, none by half; answers and searches equal the
oracle and brute force; `check` finds nothing that `check(fix=True)` does not mend; no file is left
that nothing needs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diskcache
import filelock
import trust
from trust import NAMES, Truth, as_documents, document_of, open_tiny

import kvlink_rag
import kvlink_rag.collection.adding

BATCH = 2  # documents in one transaction, so that an `add` has several
LIMIT = 4 * trust.SNAPSHOT
ROOMS = ("collection", "disk", "snapshots/store")
FILES = ("retrieval/vector_index.py", "snapshots/snapshot.py", "snapshots/sources.py")
ROOT = Path(kvlink_rag.__file__).parent
TRACED = {str(path) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
TRACED |= {str(ROOT / name) for name in FILES}
TRACED |= {diskcache.core.__file__, str(Path(filelock.__file__).with_name("_unix.py"))}

Row = tuple[str, str, str]
Place = str  # file:line


@dataclass(frozen=True, slots=True)
class Change:
    """One call on a collection: its name, and documents or ids."""

    name: str
    rows: list[Row] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def states(self, before: Truth) -> list[Truth]:
        """The documents after each of its transactions, the last one when it has returned."""
        if self.name == "delete":
            return [{id: row for id, row in before.items() if id not in self.ids}]
        states = [before]
        for start in range(0, len(self.rows), BATCH):
            batch = {id: (title, text) for id, title, text in self.rows[start : start + BATCH]}
            states.append({**states[-1], **batch})
        return states


# What a child does.


def perform(change: Change, directory: Path, limit: int | None, pair: tuple[int, str]) -> None:
    """Make one change, in a collection of its own opening."""
    seed, salt = pair
    again = change.name in ("remodel", "reembed")
    with open_tiny(directory, seed=seed, salt=salt, size_limit=limit, reencode=again) as rag:
        if change.name == "add":
            rag.add(as_documents(change.rows))
        elif change.name == "update":
            rag.update(as_documents(change.rows))
        elif change.name == "delete":
            rag.delete(change.ids)
        elif change.name == "save":
            rag.parts.index.reset()
        elif change.name == "ask":
            rag.ask(change.ids[0], k=4, max_new_tokens=2)
        elif change.name == "check":
            rag.check(fix=True)


def child(
    changes: list[Change], directory: Path, limit: int | None, pair: tuple[int, str], notes: int
) -> None:
    """Make all changes; one byte into `notes` as each has returned, one before the first."""
    kvlink_rag.collection.adding.BATCH = BATCH
    os.write(notes, b".")
    for change in changes:
        perform(change, directory, limit, pair)
        os.write(notes, b".")


def count_lines(
    action: Callable[[], None], fatal: tuple[Place, int] | None = None
) -> Counter[Place]:
    """Run `action` and count how often it comes to each line of `TRACED`.

    fatal: SIGKILL at this line, when it is come to for the n-th time.
    """
    seen: Counter[Place] = Counter()

    def trace(frame: Any, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if name not in TRACED:
            return None
        if event == "line":
            place = f"{name}:{frame.f_lineno}"
            seen[place] += 1
            if fatal is not None and place == fatal[0] and seen[place] == fatal[1]:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return seen


def fork(action: Callable[[], None]) -> int:
    """Run `action` in a child; its process id. An error there ends it with 1."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    """How a child ended: 0, 1 for an error, or minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# Damage that a `check` which is then killed must mend.


def damage(directory: Path, chance: random.Random) -> str:
    """Do one thing to the derived files that `check` must mend."""
    snapshots = sorted((directory / "snapshots").rglob("*.safetensors"))
    kind = chance.choice(["flip", "remove", "truncate", "stray", "table", "index", "no index"])
    if kind == "stray":
        (directory / "snapshots" / "stray").write_text("?")
    elif kind == "table":
        (directory / "snapshots" / "cache.db").unlink(missing_ok=True)
    elif kind == "no index":
        (directory / "index.faiss").unlink(missing_ok=True)
    else:
        path = directory / "index.faiss" if kind == "index" else chance.choice([*snapshots, None])
        if path is not None and path.exists():
            spoil(path, kind, chance)
    return kind


def spoil(path: Path, kind: str, chance: random.Random) -> None:
    if kind == "remove":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if kind == "truncate":
        data = data[: chance.randrange(len(data))]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


# The parent.


class Run:
    """One collection that lives through many kills."""

    def __init__(self, directory: Path, limit: int | None, chance: random.Random) -> None:
        self.directory, self.limit, self.chance = directory, limit, chance
        self.truth: Truth = {}
        self.pair = (0, "")
        self.lines: dict[str, dict[Place, int]] = {}
        self.seconds: dict[str, float] = {}
        self.killed: Counter[str] = Counter()
        self.in_flight: Counter[str] = Counter()
        self.survived = 0

    def case(self) -> list[str]:
        """One child, one kill, one look; what does not hold."""
        changes = self._changes()
        kind = changes[0].name
        if kind == "check":
            damage(self.directory, self.chance)
        pair = self._pair(kind)
        if kind not in self.lines:
            self._measure(kind, changes, pair)
        by_line = self.chance.random() < 0.5
        acknowledged, code = self._strike(kind, changes, pair, by_line)
        if code not in (0, -signal.SIGKILL):
            return [f"the child of {kind} ended with {code}"]
        self.survived += code == 0
        self.killed[kind] += code != 0
        allowed = self._allowed(changes, acknowledged)
        return [f"{kind}: {line}" for line in self._look(allowed, pair, kind)]

    def _changes(self) -> list[Change]:
        """What a child is to do: one kind of change, up to three times."""
        chance = self.chance
        kinds = ["add", "update", "delete", "save", "ask", "check", "remodel", "reembed"]
        kind = chance.choices(kinds, weights=[5, 3, 3, 2, 3, 3, 1, 1])[0]
        truth, changes = dict(self.truth), []
        for _ in range(chance.randrange(1, 4)):
            change = self._change(kind, truth)
            truth = change.states(truth)[-1]
            changes.append(change)
        return changes[:1] if kind in ("remodel", "reembed") else changes

    def _change(self, kind: str, truth: Truth) -> Change:
        chance, known = self.chance, sorted(truth)
        some = chance.sample(known, min(len(known), chance.randrange(1, 5)))
        if kind == "add":
            ids = chance.sample([name.lower() for name in NAMES], chance.randrange(1, 6))
            return Change(kind, [document_of(chance, id) for id in ids])
        if kind == "update":
            return Change(kind, [document_of(chance, id) for id in some])
        if kind == "delete":
            return Change(kind, ids=some)
        return Change(kind, ids=[f"{chance.choice(NAMES)}?"] if kind == "ask" else [])

    def _pair(self, kind: str) -> tuple[int, str]:
        """Model and embedder to open with: others for a re-encoding."""
        seed, salt = self.pair
        if kind == "remodel":
            return 1 - seed, salt
        return (seed, "" if salt else "salt") if kind == "reembed" else (seed, salt)

    def _measure(self, kind: str, changes: list[Change], pair: tuple[int, str]) -> None:
        """Lines and seconds of an undisturbed run, on a copy."""
        copy = self.directory.with_name(f"{self.directory.name}-copy")
        shutil.copytree(self.directory, copy)
        found = self.directory.with_name("measured")
        quiet = os.open(os.devnull, os.O_WRONLY)

        def measured() -> None:
            begun = time.perf_counter()
            child(changes, copy, self.limit, pair, quiet)
            seconds = time.perf_counter() - begun
            shutil.rmtree(copy)
            shutil.copytree(self.directory, copy)
            lines = count_lines(lambda: child(changes, copy, self.limit, pair, quiet))
            found.write_text(json.dumps([seconds, lines]))

        code = ended(fork(measured))
        if code:
            raise RuntimeError(f"the child that measures {kind} ended with {code}")
        self.seconds[kind], self.lines[kind] = json.loads(found.read_text())
        os.close(quiet)
        shutil.rmtree(copy)

    def _strike(
        self, kind: str, changes: list[Change], pair: tuple[int, str], by_line: bool
    ) -> tuple[int, int]:
        """Run the child and kill it: how many changes returned, and how it ended."""
        read, write = os.pipe()
        place = self.chance.choice(sorted(self.lines[kind]))  # a rare line as likely as any
        times = self.chance.randint(1, self.lines[kind][place])
        wait = self.chance.uniform(0, 1.1 * self.seconds[kind])

        def task() -> None:
            os.close(read)
            count_lines(
                lambda: child(changes, self.directory, self.limit, pair, write), (place, times)
            )

        process = fork(task if by_line else lambda: child(
            changes, self.directory, self.limit, pair, write
        ))  # fmt: skip
        os.close(write)
        notes = os.read(read, 1)  # it has begun
        if not by_line:
            time.sleep(wait)
            os.kill(process, signal.SIGKILL)
        code = ended(process)
        while more := os.read(read, 100):
            notes += more
        os.close(read)
        return max(0, len(notes) - 1), code

    def _allowed(self, changes: list[Change], acknowledged: int) -> list[Truth]:
        """The states the documents may be in; the first is the acknowledged one."""
        truth = self.truth
        for change in changes[:acknowledged]:
            truth = change.states(truth)[-1]
        if acknowledged == len(changes):
            return [truth]
        return [truth, *changes[acknowledged].states(truth)]

    def _look(self, allowed: list[Truth], pair: tuple[int, str], kind: str) -> list[str]:
        """Open what is left and say what does not hold."""
        again = kind in ("remodel", "reembed")
        seed, salt = pair
        with open_tiny(
            self.directory, seed=seed, salt=salt, size_limit=self.limit, reencode=again
        ) as rag:
            found = trust.held(rag)
            self.in_flight[kind] += found != allowed[0]
            problems = trust.broken(rag, allowed, self.chance)
            self.truth, self.pair = found, pair
        return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    chance = random.Random(arguments.seed)
    trust.tiny_model(0), trust.tiny_model(1)
    begun, failures = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as root:
        runs = [Run(Path(root, "whole"), None, chance), Run(Path(root, "small"), LIMIT, chance)]
        for run in runs:
            run.directory.mkdir()
        while sum(sum(run.killed.values()) for run in runs) < arguments.kills:
            run = chance.choice(runs)
            for line in run.case():
                failures.append(line)
                print(f"FAILED after {sum(sum(r.killed.values()) for r in runs)} kills: {line}")
            if len(failures) > 20:
                break
    killed = sum((run.killed for run in runs), Counter())
    report = {
        "kills": sum(killed.values()),
        "by_kind": dict(sorted(killed.items())),
        "change_under_way_was_stored": sum(sum(run.in_flight.values()) for run in runs),
        "children_that_finished": sum(run.survived for run in runs),
        "failures": len(failures),
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(report))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
