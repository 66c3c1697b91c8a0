"""Files into a collection: read, split, add, and drop what a file no longer says.

A file is known by its source, the path as it was given: indexing it again replaces its passages.
Knows readers, splitting and `KVLinkRAG`; knows nothing of terminals.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.documents import Document

from .readers import MAX_BYTES, OnProblem, Problem, ReadOptions, SourceFile, read_file
from .splitter import MAX_TOKENS, Encoder, split_document


@dataclass(slots=True)
class IngestReport:
    """What became of some files.

    documents: as read; passages: as split, of which `repeated` ones stood before in these files.
    added, replaced, unchanged, removed: passages of the collection. encoded, tokens: snapshots
    made now. skipped: places that gave nothing; warnings: places that gave less than they hold.
    gone: sources of passages whose files are no more.
    """

    files: int = 0
    documents: int = 0
    passages: int = 0
    repeated: int = 0
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    removed: int = 0
    encoded: int = 0
    tokens: int = 0
    skipped: int = 0
    warnings: int = 0
    seconds: float = 0.0
    gone: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def ingest(
    rag: KVLinkRAG,
    files: Sequence[SourceFile],
    *,
    on_problem: OnProblem,
    advance: Callable[[int], object] = lambda size: None,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
    encoding: str | None = None,
    text_key: str = "text",
) -> IngestReport:
    """Bring `rag` up to date with `files`. `advance` is told bytes as they are taken in.

    Passages are durable batch by batch: what an interruption leaves out, the next call adds. Old
    passages of a file are dropped once all of it is in, unless a part of it could not be read.
    """
    start = time.perf_counter()
    options = ReadOptions(max_bytes, encoding, text_key)
    intake = Intake(rag.model.tokenizer, files, on_problem, advance, max_tokens, options)
    done = rag.add(intake.passages())
    known = _sources(rag)  # as it is now: a passage may have moved to another file
    stale = [id for source, ids in intake.read.items() for id in known.get(source, set()) - ids]
    report = intake.report
    report.removed = rag.delete(stale) if stale else 0
    report.added, report.replaced, report.unchanged = done.added, done.replaced, done.unchanged
    report.encoded, report.tokens = done.encoded, done.tokens
    report.seconds = time.perf_counter() - start
    return report


def gone(rag: KVLinkRAG, paths: Iterable[str]) -> list[str]:
    """Sources at or below `paths` that passages name and that are no files any more."""
    roots = [Path(path) for path in paths]
    return sorted(
        source
        for source in _sources(rag)
        if any(_is_below(Path(source), root) for root in roots) and not Path(source).exists()
    )


def ids_from(rag: KVLinkRAG, sources: Iterable[str]) -> set[str]:
    """Ids of all passages whose source is one of `sources`."""
    known = _sources(rag)
    return {id for source in sources for id in known.get(Path(source).as_posix(), ())}


def _sources(rag: KVLinkRAG) -> dict[str, set[str]]:
    """The ids of each source's passages."""
    found: dict[str, set[str]] = {}
    for document in rag.documents():
        source = document.metadata.get("source")
        if isinstance(source, str) and document.id is not None:
            found.setdefault(source, set()).add(document.id)
    return found


def _is_below(source: Path, root: Path) -> bool:
    inside = not source.is_absolute() and ".." not in source.parts
    return source.is_relative_to(root) or (root == Path() and inside)


class Intake:
    """Passages of files on their way in, counted."""

    def __init__(
        self,
        encoder: Encoder,
        files: Sequence[SourceFile],
        on_problem: OnProblem,
        advance: Callable[[int], object],
        max_tokens: int,
        options: ReadOptions,
    ) -> None:
        self.report = IngestReport(files=len(files))
        self.read: dict[str, set[str]] = {}  # ids of the passages of each file read to its end
        self._encoder = encoder
        self._first: dict[str, tuple[str, bytes]] = {}  # of each id: its file, a digest of its text
        self._files, self._on_problem, self._advance = files, on_problem, advance
        self._max_tokens, self._options = max_tokens, options

    def passages(self) -> Iterator[Document]:
        """The passages of all files, each file's in turn."""
        for file in self._files:
            skipped, ids = self.report.skipped, set()
            progress = _FileProgress(file, self._advance)
            for passage in self._of_file(file):
                if self._is_new(passage, file.source):
                    ids.add(str(passage.id))
                    yield passage
                progress.passed(len(passage.text))
            progress.end()
            if self.report.skipped == skipped:
                self.read[file.source] = self.read.get(file.source, set()) | ids

    def _is_new(self, passage: Document, source: str) -> bool:
        """Whether its id is new among these files. Another text under a known id is told."""
        content = f"{passage.title}\n{passage.text}".encode("utf-8", "surrogatepass")
        mine = (source, hashlib.sha256(content).digest())
        where, digest = first = self._first.setdefault(str(passage.id), mine)
        if first is mine:
            return True
        if digest == mine[1]:
            self.report.repeated += 1
        else:
            message = f"id {passage.id!r} stands for another text in {where}; give each its own id"
            self._problem(Problem(source, message))
        return False

    def _of_file(self, file: SourceFile) -> Iterator[Document]:
        for document in read_file(file, self._problem, self._options):
            self.report.documents += 1
            for passage in split_document(document, self._encoder, self._max_tokens):
                self.report.passages += 1
                yield passage.identified()

    def _problem(self, problem: Problem) -> None:
        self.report.skipped += problem.skipped
        self.report.warnings += not problem.skipped
        self._on_problem(problem)


class _FileProgress:
    """Turns characters of passages into bytes of their file, so that each file counts whole."""

    def __init__(self, file: SourceFile, advance: Callable[[int], object]) -> None:
        self._left, self._advance = file.size(), advance

    def passed(self, size: int) -> None:
        """So many characters more."""
        size = min(size, self._left)
        self._left -= size
        self._advance(size)

    def end(self) -> None:
        """The file is done."""
        self._advance(self._left)
