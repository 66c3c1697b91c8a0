"""What indexing some files will take, before it is done: passages, tokens, bytes, time.

All passages are read, split and tokenised, and a snapshot's size follows from its tokens alone. For
time, and for what catalog and index take, a sample is really indexed, into a temporary directory.
Knows `KVLinkRAG` and `ingest`; knows nothing of terminals.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvlink_rag.arguments import MAX_TOKENS
from kvlink_rag.collection.opening import SNAPSHOTS
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.documents import Document

from .index_files import Intake, splitting_encoder
from .readers import MAX_BYTES, OnProblem, ReadOptions, SourceFile

SAMPLE = 64  # passages that are indexed at most
PACKED = (".pdf", ".docx", ".pptx", ".xlsx", ".epub")
_PACKED = 20  # times the size of such a file: more text than any but a bomb has
SECONDS = 5.0  # after which no further step of the sample begins


@dataclass(frozen=True, slots=True)
class Plan:
    """What `index` would make of some files in an empty collection.

    passages: as split, each counted once. snapshots, tokens: different ones, since equal passages
    share theirs. snapshot_bytes: exact; with compression, the most. other_bytes (catalog, index,
    table of snapshots) and seconds (embedding and encoding): from a sample of `sample_passages`
    passages, whose last step ran at `tokens_per_second`.
    """

    model: str
    embedder: str
    codec: str
    files: int
    documents: int
    passages: int
    snapshots: int
    tokens: int
    skipped: int
    snapshot_bytes: int
    other_bytes: int
    seconds: float
    tokens_per_second: float
    sample_passages: int
    compression: str = "none"

    @property
    def total_bytes(self) -> int:
        """All bytes of the collection."""
        return self.snapshot_bytes + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `total_bytes`."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def plan(
    files: Sequence[SourceFile],
    open_empty: Callable[[Path], KVLinkRAG],
    *,
    on_problem: OnProblem,
    advance: Callable[[int], object] = lambda size: None,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
    encoding: str | None = None,
    text_key: str = "text",
    seconds: float = SECONDS,
) -> Plan:
    """Plan for `files`. Keeps nothing.

    open_empty: opens a collection, with the model, embedder and codec to plan for, in a new
    directory. Other arguments as in `ingest`; seconds: for the sample, about.
    """
    with TemporaryDirectory(prefix="kvlink-plan-") as scratch:
        with open_empty(Path(scratch) / "sample") as rag:
            # 1. files → passages → tokens, and bytes of their snapshots
            options = ReadOptions(max_bytes, encoding, text_key)
            encoder = splitting_encoder(rag, max_tokens)
            intake = Intake(encoder, files, on_problem, advance, max_tokens, options)
            count = _Count.of(rag, intake)
            # 2. a sample into the collection
            sampled, rate = _index(rag, count.sample, seconds)
            with open_empty(Path(scratch) / "empty"):
                pass
            names, compression = rag.stats(), rag.compression
        # 3. what the sample took beside snapshots, for all
        empty, filled = (_other_bytes(Path(scratch) / name) for name in ("empty", "sample"))
    grown = (filled - empty) * count.passages / sampled if sampled else 0
    return Plan(
        model=names.model,
        embedder=names.embedder,
        codec=names.codec,
        files=len(files),
        documents=intake.report.documents,
        passages=count.passages,
        snapshots=len(count.seen),
        tokens=count.tokens,
        skipped=intake.report.skipped,
        snapshot_bytes=count.snapshot_bytes(),
        other_bytes=round(empty + grown),
        seconds=round(count.tokens / rate, 1) if rate else 0.0,
        tokens_per_second=round(rate, 1),
        sample_passages=sampled,
        compression=compression,
    )


def bytes_at_most(rag: KVLinkRAG, files: Sequence[SourceFile]) -> int:
    """A bound of what the snapshots of `files` take, from the files' sizes alone.

    A token has a byte at least; half as much again for titles and what each snapshot's file has
    besides. Packed formats hold more than their size.
    """
    size = sum(file.size() * (_PACKED if file.suffix in PACKED else 1) for file in files)
    one, two = (rag.snapshots.planned_bytes(tokens) for tokens in (1000, 2000))
    return round(1.5 * size * (two - one) / 1000) + len(files) * rag.snapshots.planned_bytes(64)


def new_bytes(
    rag: KVLinkRAG,
    files: Sequence[SourceFile],
    *,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
    encoding: str | None = None,
    text_key: str = "text",
) -> int:
    """What the snapshots of `files` take that the collection does not have; compressed, less.

    Reads and splits all of them, and tells no problem.
    """
    options = ReadOptions(max_bytes, encoding, text_key)
    encoder = splitting_encoder(rag, max_tokens)
    count = _Count.of(rag, Intake(encoder, files, _nothing, _nothing, max_tokens, options))
    held = set(rag.snapshots.store.keys())
    return count.snapshot_bytes(without=held)


def _nothing(told: object) -> None:
    """For what nobody is told."""


class _Count:
    """Passages counted, and a fair sample of them (Vitter's reservoir, from a fixed seed)."""

    def __init__(self, rag: KVLinkRAG) -> None:
        self.passages = 0
        self.seen: dict[bytes, int] = {}  # tokens of each key
        self.sample: list[Document] = []
        self._rag, self._random = rag, random.Random(0)

    @classmethod
    def of(cls, rag: KVLinkRAG, intake: Intake) -> _Count:
        """All passages of `intake`, counted."""
        count = cls(rag)
        for passage in intake.passages():
            count.take(passage)
        return count

    @property
    def tokens(self) -> int:
        """Tokens of all snapshots."""
        return sum(self.seen.values())

    def take(self, passage: Document) -> None:
        """Count one more."""
        ids = self._rag.model.passage_tokens(passage)
        key = bytes.fromhex(self._rag.snapshots.key(ids))
        self.seen[key] = len(ids)
        place = self._random.randrange(self.passages + 1)
        self.passages += 1
        if len(self.sample) < SAMPLE:
            self.sample.append(passage)
        elif place < SAMPLE:
            self.sample[place] = passage

    def snapshot_bytes(self, without: Collection[str] = ()) -> int:
        """Of all snapshot files, but those of the keys `without`."""
        lengths = Counter(n for key, n in self.seen.items() if key.hex() not in without)
        planned = self._rag.snapshots.planned_bytes
        return sum(planned(length) * count for length, count in lengths.items())


def _index(rag: KVLinkRAG, sample: Sequence[Document], seconds: float) -> tuple[int, float]:
    """Index 1, 1, 2, 4, … of `sample` until time is up: how many, tokens a second of the last step.

    The first passage is there to warm up.
    """
    deadline = time.perf_counter() + seconds
    done, rate = 0, 0.0
    while done < len(sample) and (done < 2 or time.perf_counter() < deadline):
        step = sample[done : 2 * done or 1]
        start = time.perf_counter()
        report = rag.add(step)
        done += len(step)
        if report.tokens:
            rate = report.tokens / (time.perf_counter() - start)
    return done, rate


def _other_bytes(directory: Path) -> int:
    """Bytes of all files in `directory` that are not snapshots."""
    total = 0
    for folder, _, names in os.walk(directory):
        inside = Path(folder).parent == directory / SNAPSHOTS  # the folders they are fanned out to
        total += 0 if inside else sum(os.path.getsize(os.path.join(folder, n)) for n in names)
    return total
