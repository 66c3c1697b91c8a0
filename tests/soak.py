"""Processes and threads on one directory for minutes, under a small size budget.

    python tests/soak.py --minutes 5 --processes 3 --threads 3

Each process asks, searches, adds, replaces, deletes and checks, all at once with the others, while
the store holds a third of the snapshots at most. Every answer is compared with the oracle, every
snapshot that is held while others are evicted with a fresh encoding, and at the end the documents
with what each process was told is stored. Memory and open files are measured after a quarter of
the time and at the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trust
from stress_crash import ended, fork
from trust import Truth, as_documents, document_of, open_tiny

from kvlink_rag import KVLinkRAG, Trace
from kvlink_rag.snapshots.sources import EncodeNow

IDS = 8  # documents of one process
MOST_GROWTH = 32 << 20  # bytes; what the allocator may keep
MOST_FILES = 8  # a connection or two of each thread


@dataclass(slots=True)
class Load:
    """One process's part: its documents, its counts, what went wrong."""

    rag: KVLinkRAG
    name: str
    seed: int
    stop: float
    truth: Truth = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def work(self, number: int) -> None:
        """One thread: whatever chance says, until the time is over."""
        chance = random.Random(f"{self.seed} {self.name} {number}")
        actions = [self.ask] * 6 + [self.search, self.hold, self.change, self.change, self.change]
        try:
            while time.monotonic() < self.stop and not self.wrong:
                action = chance.choice([*actions, self.check] if chance.random() < 0.1 else actions)
                action(chance)
                self.counts[action.__name__] += 1
        except BaseException:
            self.wrong.append(f"{self.name}.{number}: {traceback.format_exc()}")

    def ask(self, chance: random.Random) -> None:
        self.wrong += trust.wrong_answers(self.rag, chance)

    def search(self, chance: random.Random) -> None:
        hits = self.rag.search(chance.choice(trust.NAMES), 5)
        if [hit.score for hit in hits] != sorted((hit.score for hit in hits), reverse=True):
            self.wrong.append("hits are not in order")

    def hold(self, chance: random.Random) -> None:
        """A mapped snapshot stays what it was, whatever is evicted meanwhile."""
        document = chance.choice([hit.document for hit in self.rag.search("mill", 5)] or [None])
        if document is None:
            return
        ids = self.rag.model.passage_tokens(document)
        (held,) = self.rag.snapshots.fetch([ids], Trace())
        self.rag.ask(chance.choice(trust.NAMES), k=8, max_new_tokens=1)
        (fresh,) = EncodeNow(self.rag.model.encoder).fetch([ids], Trace())
        if not torch.allclose(held.keys, fresh.keys, atol=1e-4):
            self.wrong.append(f"the snapshot of {document.id} changed while it was held")

    def change(self, chance: random.Random) -> None:
        with self.lock:
            ids = [f"{self.name}-{n}" for n in chance.sample(range(IDS), chance.randrange(1, 4))]
            if chance.random() < 0.35:
                self.rag.delete([id for id in ids if id in self.truth])
                self.truth = {id: row for id, row in self.truth.items() if id not in ids}
            else:
                rows = [document_of(chance, id) for id in ids]
                self.rag.add(as_documents(rows))
                self.truth.update({id: (title, text) for id, title, text in rows})
            mine = {id: row for id, row in trust.held(self.rag).items() if id in self.names()}
            if mine != self.truth:
                self.wrong.append(f"documents {trust.difference(mine, self.truth)}")

    def check(self, chance: random.Random) -> None:
        lines = self.rag.check(fix=chance.random() < 0.5)
        # A reader may store what a writer has just deleted: told, mended, and no fault.
        self.wrong += [line for line in lines if "belongs to no document" not in line]

    def names(self) -> set[str]:
        return {f"{self.name}-{n}" for n in range(IDS)}


def measure() -> tuple[int, int]:
    """Bytes resident and files open."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def process(directory: Path, name: str, arguments: argparse.Namespace, report: Path) -> None:
    """What one process does; its findings go into the file `report`."""
    seconds = arguments.minutes * 60
    limit = arguments.processes * IDS * trust.SNAPSHOT // 6
    with open_tiny(directory, size_limit=limit, prefix_budget=1 << 20) as rag:
        load = Load(rag, name, arguments.seed, time.monotonic() + seconds)
        threads = [threading.Thread(target=load.work, args=(n,)) for n in range(arguments.threads)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        early = measure()
        for thread in threads:
            thread.join()
        late = measure()
        if late[0] - early[0] > MOST_GROWTH:
            load.wrong.append(f"memory grew from {early[0]} to {late[0]} bytes")
        if late[1] - early[1] > MOST_FILES:
            load.wrong.append(f"open files grew from {early[1]} to {late[1]}")
        stats = rag.stats()
        report.write_text(
            json.dumps(
                {
                    "wrong": load.wrong,
                    "counts": load.counts,
                    "truth": load.truth,
                    "megabytes": [early[0] >> 20, late[0] >> 20],
                    "open_files": [early[1], late[1]],
                    "store": {
                        k: getattr(stats, k) for k in ("hits", "misses", "evicted", "corrupt")
                    },
                }
            )
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=3, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    trust.tiny_model()
    with tempfile.TemporaryDirectory() as root:
        directory, reports = Path(root, "c"), []
        children = []
        for number in range(arguments.processes):
            reports.append(Path(root, f"report{number}"))
            children.append(
                fork(lambda n=number: process(directory, f"p{n}", arguments, reports[n]))
            )
        codes = [ended(child) for child in children]
        found = [json.loads(r.read_text()) for r in reports if r.exists()]
        wrong = [line for report in found for line in report["wrong"]]
        wrong += [f"a process ended with {code}" for code in codes if code]
        truth = {id: tuple(row) for report in found for id, row in report["truth"].items()}
        with open_tiny(directory) as rag:
            wrong += trust.broken(rag, [truth], random.Random(arguments.seed))
    for line in wrong:
        print(f"FAILED: {line}")
    counts = sum((Counter(report["counts"]) for report in found), Counter())
    store = sum((Counter(report["store"]) for report in found), Counter())
    summary = {
        "minutes": arguments.minutes,
        "processes": arguments.processes,
        "threads": arguments.threads,
        "calls": dict(sorted(counts.items())),
        "store": dict(store),
        "megabytes_early_late": [report["megabytes"] for report in found],
        "open_files_early_late": [report["open_files"] for report in found],
        "failures": len(wrong),
    }
    print(json.dumps(summary))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
