"""Files into a collection: read, split, add, and drop what a file no longer says.

A file is known by its resolved path (`sources`): indexing it again, by whatever spelling, replaces
its passages. Knows readers, the splitter and `KVLinkRAG`; knows nothing of terminals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

from kvlink_rag.arguments import MAX_TOKENS
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentNotFound
from kvlink_rag.retrieval.embedder import Windowed

from .readers import MAX_BYTES, OnProblem, Problem, ReadOptions, SourceFile, read_file
from .sources import (
    FILE_KEY,
    Known,
    digest,
    exists,
    files_of,
    gone_files,
    identity,
    is_below,
    known_passages,
    matching,
    shown,
)
from .splitter import Encoder, split_document


@dataclass(slots=True)
class IngestReport:
    """What became of some files.

    documents: as read; passages: as split, of which `repeated` ones stood before in these files.
    added, replaced, unchanged, removed: passages of the collection. encoded, tokens: snapshots
    made now; deferred: passages over the budget, which are encoded when they are asked for.
    skipped: places that gave nothing; warnings: places that gave less than they hold.
    gone: sources of passages whose files are no more; moved: those whose text another file has
    now, as (old, new). Their passages are removed only by `sync`.
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
    deferred: int = 0
    skipped: int = 0
    warnings: int = 0
    seconds: float = 0.0
    gone: list[str] = field(default_factory=list)
    moved: list[tuple[str, str]] = field(default_factory=list)

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
    roots: Iterable[str | PathLike[str]] = (),
    sync: bool = False,
    dry_run: bool = False,
) -> IngestReport:
    """Bring `rag` up to date with `files`. `advance` is told bytes as they are taken in.

    Passages are durable batch by batch: what an interruption leaves out, the next call adds. Old
    passages of a file are dropped once all of it is in, unless a part of it could not be read: then
    they are kept, and told. A passage that other files hold too stays.
    max_tokens: of a passage, in the model's tokens; fewer where the embedder says its window and
    would not read all of it. encoding, text_key: as in `read_paths`. roots: folders to look in for
    files that are no more. sync: also remove their passages, and those of files that moved (what
    they say is not encoded again). dry_run: only say what would be done.
    """
    start = time.perf_counter()
    options = ReadOptions(max_bytes, encoding, text_key)
    known = known_passages(rag)
    encoder = splitting_encoder(rag, max_tokens)
    intake = Intake(encoder, files, on_problem, advance, max_tokens, options, known)
    report = intake.report
    if dry_run:
        for _ in intake.passages():
            pass
        report.added, report.unchanged = intake.fresh, intake.same
        report.replaced = intake.yielded - intake.fresh - intake.same
    else:
        done = rag.add(intake.passages())
        report.added, report.replaced, report.unchanged = done.added, done.replaced, done.unchanged
        report.encoded, report.tokens, report.deferred = done.encoded, done.tokens, done.deferred
    intake.tell_kept()
    holders = intake.holders()
    moved, lost = _gone(holders, intake, [identity(root) for root in roots])
    report.moved = [(shown(old), shown(new)) for old, new in sorted(moved.items())]
    report.gone = [shown(file) for file in sorted(lost)]
    leave = {*moved, *lost} if sync else set()
    if report.moved and not sync:
        on_problem(_moved(report))
    report.removed = _settle(rag, holders, intake, leave, dry_run=dry_run)
    report.seconds = time.perf_counter() - start
    return report


def _gone(
    holders: Mapping[str, frozenset[str]], intake: Intake, roots: Sequence[str]
) -> tuple[dict[str, str], set[str]]:
    """Files that are no more: those that moved, with their new places, and those in `roots`."""
    texts: dict[str, set[bytes]] = {}
    for id, files in holders.items():
        for file in files - intake.files:
            texts.setdefault(file, set()).add(intake.digest_of(id))
    absent = [file for file in texts if not exists(file)]
    moved = {}
    for file in absent:
        places = {intake.places.get(text) for text in texts[file]}
        if len(places) == 1 and (place := places.pop()) is not None:
            moved[file] = place
    return moved, {file for file in absent if file not in moved and is_below(file, roots)}


def _moved(report: IngestReport) -> Problem:
    """The warning that passages are there twice."""
    report.warnings += 1
    old, new = report.moved[0]
    more = f" and {len(report.moved) - 1} more files" if len(report.moved) > 1 else ""
    message = f"moved to {new}{more}; what is known from the old place stays until it is synced"
    return Problem(old, message, skipped=False)


def _settle(
    rag: KVLinkRAG,
    holders: Mapping[str, frozenset[str]],
    intake: Intake,
    leave: set[str],
    *,
    dry_run: bool,
) -> int:
    """Remove passages that no file holds any more, and note who holds the others; how many."""
    left = {id: files - leave for id, files in holders.items()}
    stale = [*(id for id, files in left.items() if not files), *intake.superseded]
    changed = [id for id, files in left.items() if files and files != intake.written(id)]
    if dry_run:
        return len(stale)
    if changed:
        documents = rag.get(changed, missing_ok=True)
        rag.add([_held_by(document, left[str(document.id)]) for document in documents])
    return rag.delete(stale, missing_ok=True) if stale else 0


def _held_by(document: Document, files: Iterable[str]) -> Document:
    """The passage as one of `files`; the source shown is one of them where it was a file's."""
    held, source = sorted(files), document.metadata.get("source")
    metadata = {**document.metadata, FILE_KEY: held}
    if isinstance(source, str) and identity(source) in set(files_of(document)) - set(held):
        metadata["source"] = shown(held[0])
    return replace(document, metadata=metadata)


def gone(rag: KVLinkRAG, paths: Iterable[str | PathLike[str]]) -> list[str]:
    """Sources at or below `paths` that passages are from and that are no files any more."""
    files = {file for known in known_passages(rag).values() for file in known.files}
    return [shown(file) for file in gone_files(files, map(identity, paths))]


def remove(
    rag: KVLinkRAG, sources: Iterable[str], *, ids: Iterable[str] = (), now: bool = False
) -> tuple[int, int]:
    """Delete the passages of `sources` (files, folders, patterns such as `docs/*.md`), and `ids`.

    A passage that a file outside `sources` holds too stays, and is that file's. now: as in
    `KVLinkRAG.delete`. Returns how many were deleted, how many stay. Raises `DocumentNotFound`,
    and deletes none, where a source or an id means no passage.
    """
    left: dict[str, frozenset[str]] = {}
    for source in sources:
        if not (found := matching(rag, source)):
            raise DocumentNotFound(f"no passage of {source!r} in {rag.directory}")
        for id, files in found.items():
            left[id] = left.get(id, files) & files
    left |= dict.fromkeys(ids, frozenset())
    kept = {id: files for id, files in left.items() if files}
    documents = rag.get(kept)
    count = rag.delete(sorted(left.keys() - kept.keys()), now=now)
    if documents:
        rag.add([_held_by(document, kept[str(document.id)]) for document in documents])
    return count, len(kept)


def splitting_encoder(rag: KVLinkRAG, max_tokens: int) -> Encoder:
    """What passages of at most `max_tokens` are counted with, so that model and embedder fit."""
    embedder, reader = rag.embedder, rag.model.tokenizer
    return _Both(reader, embedder, max_tokens) if isinstance(embedder, Windowed) else reader


class _Both:
    """Tokens of the model, or of the embedder, in units of which both fit as many.

    An eighth of the embedder's window is left to the passage's title.
    """

    def __init__(self, reader: Encoder, embedder: Windowed, max_tokens: int) -> None:
        self._reader, self._embedder, self._most = reader, embedder, max_tokens

    def encode(self, text: str) -> list[int]:
        """The model's token ids, and more of them where the embedder is the fuller one."""
        ids = self._reader.encode(text)
        if len(ids) > self._most:
            return ids
        window = self._embedder.window
        (count,) = self._embedder.count_tokens([text])
        return ids + [0] * (-(-count * self._most // (window - window // 8)) - len(ids))


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
        known: Mapping[str, Known] | None = None,
    ) -> None:
        self.report = IngestReport(files=len(files))
        self.files = {identity(file.path) for file in files}
        self.places: dict[bytes, str] = {}  # of each text: a file that holds it now
        self.yielded = self.fresh = self.same = 0
        self.superseded: list[str] = []  # ids of passages that were made before files were noted
        self._known = known or {}
        self._held: dict[str, set[str]] = {}  # ids of the passages that each file holds now
        self._partly: dict[str, str] = {}  # files of which a part could not be read
        self._encoder = encoder
        self._first: dict[str, tuple[str, bytes]] = {}  # of each id: its file, a digest of its text
        self._written: dict[str, frozenset[str]] = {}  # the files that were noted for each id
        self._sources = files
        self._on_problem, self._advance = on_problem, advance
        self._max_tokens, self._options = max_tokens, options

    def passages(self) -> Iterator[Document]:
        """The passages of all files, each file's in turn."""
        for file in self._sources:
            skipped, name = self.report.skipped, identity(file.path)
            held = self._held.setdefault(name, set())
            progress = _FileProgress(file, self._advance)
            for passage in self._of_file(file, name):
                text = digest(passage)
                if self._is_held(passage, file.source, name, text):
                    held.add(str(passage.id))
                    self.places.setdefault(text, name)
                    if str(passage.id) not in self._written:
                        yield self._noted(passage, name, text)
                progress.passed(len(passage.text))
            progress.end()
            if self.report.skipped != skipped:
                self._partly[name] = file.source

    def holders(self) -> dict[str, frozenset[str]]:
        """The files that hold each passage now, as far as any file ever did.

        A file that was read to its end holds what it gave; others still hold what they held.
        """
        found: dict[str, set[str]] = {id: set() for id in self._written}
        for id, known in self._known.items():
            if known.files:
                found[id] = {f for f in known.files if f not in self._held or f in self._partly}
        for file, ids in self._held.items():
            for id in ids:
                found.setdefault(id, set()).add(file)
        return {id: frozenset(files) for id, files in found.items()}

    def written(self, id: str) -> frozenset[str]:
        """The files that the collection has for a passage."""
        known = self._known.get(id)
        return self._written.get(id, known.files if known else frozenset())

    def digest_of(self, id: str) -> bytes:
        """A digest of the text of a passage."""
        known = self._known.get(id)
        return known.digest if known else self._first[id][1]

    def tell_kept(self) -> None:
        """Old passages of files that could not be read whole: they stay, and it is said."""
        for file, source in self._partly.items():
            held = self._held[file]
            kept = sum(file in known.files and id not in held for id, known in self._known.items())
            if kept:
                passages = "1 passage" if kept == 1 else f"{kept} passages"
                message = f"kept {passages} of before, since not all of it could be read now"
                self._problem(Problem(source, message, skipped=False))

    def _is_held(self, passage: Document, source: str, name: str, text: bytes) -> bool:
        """Whether this file holds the passage. Another text under a known id is told."""
        if self._is_anothers(passage, source, name, text):
            return False
        where, first = self._first.setdefault(str(passage.id), (source, text))
        if first != text:
            self._tell_other(passage, source, where)
            return False
        self.report.repeated += str(passage.id) in self._written
        return True

    def _is_anothers(self, passage: Document, source: str, name: str, text: bytes) -> bool:
        """Whether the collection has another text for this id from elsewhere; told then."""
        known = self._known.get(str(passage.id))
        if known is None or name in known.files or (known.files and known.digest == text):
            return False
        if known.digest == text:
            return True  # an application's: it is there, and stays the application's
        others = sorted(file for file in known.files - self.files if exists(file))
        if known.files and not others:
            return False
        self._tell_other(passage, source, shown(others[0]) if others else "an application")
        return True

    def _tell_other(self, passage: Document, source: str, where: str) -> None:
        message = f"id {passage.id!r} stands for another text in {where}; give each its own id"
        self._problem(Problem(source, message))

    def _noted(self, passage: Document, name: str, text: bytes) -> Document:
        """The passage with the files that hold it, and shown as it was before."""
        known = self._known.get(str(passage.id))
        self.yielded += 1
        self.fresh += known is None
        self.same += known is not None and known.digest == text
        files = (known.files if known else frozenset()) | {name}
        self._written[str(passage.id)] = files
        noted = _held_by(passage, files)
        if known is None or known.digest != text or not known.source:
            return noted
        return replace(noted, metadata={**noted.metadata, "source": known.source})

    def _of_file(self, file: SourceFile, name: str) -> Iterator[Document]:
        for document in read_file(file, self._problem, self._options):
            self.report.documents += 1
            for passage in split_document(document, self._encoder, self._max_tokens):
                self.report.passages += 1
                if file.suffix == ".jsonl" and passage.id is None:
                    self._supersede(str(passage.identified().id))
                yield _identified(passage, file, name)

    def _supersede(self, id: str) -> None:
        """Lines with a `source` of their own once did not say which file they are from."""
        known = self._known.get(id)
        if known is not None and not known.files:
            self.superseded.append(id)

    def _problem(self, problem: Problem) -> None:
        self.report.skipped += problem.skipped
        self.report.warnings += not problem.skipped
        self._on_problem(problem)


def _identified(passage: Document, file: SourceFile, name: str) -> Document:
    """With an id from its content and its file, however the file's path is written."""
    if passage.id is not None:
        return passage
    metadata = {**passage.metadata, FILE_KEY: [name]}
    if metadata.get("source") == file.source:
        del metadata["source"]
    return replace(passage, id=replace(passage, metadata=metadata).identified().id)


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
