"""`kvlink-rag index`: files into the collection."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from kvlink_rag.arguments import MAX_TOKENS, Codec, Compression, Search
from kvlink_rag.disk.atomic_files import free_bytes
from kvlink_rag.errors import ConfigError
from kvlink_rag.ingest.readers import (
    MAX_BYTES,
    SUFFIXES,
    Problem,
    SourceFile,
    find,
    raise_or_log,
)
from kvlink_rag.quantities import number, size

from . import terminal
from .opening import OPTIONS, Options, collection, has_collection, load
from .values import Budget, Count, Encoding, Json, Size

if TYPE_CHECKING:
    from kvlink_rag.collection.rag import KVLinkRAG
    from kvlink_rag.ingest.index_files import IngestReport

RESUMES = True  # an interrupted run is finished by repeating it
MUCH = 0.1  # of the free disk: more is not taken unasked
SHOWN = 3  # files that are no more, or moved, by name

Paths = Annotated[
    tuple[str, ...],
    Parameter(name="PATH", help=f"files ({', '.join(SUFFIXES)}, programs) and folders"),
]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read, and what becomes of it."""

    passage_tokens: Count = MAX_TOKENS
    """the most tokens of a passage"""
    max_file_size: Annotated[Size, Parameter(show_default=lambda value: "64MB")] = MAX_BYTES
    """of a file, or of a line of a .jsonl file"""
    encoding: Encoding | None = None
    """of all text: cp1252, shift_jis, utf-16-le, … (what each file says or looks like)"""
    text_key: str = "text"
    """where the lines of .jsonl files have their text"""
    codec: Codec | None = None
    """of snapshots: exact, or smaller at a price, see verify (the collection's, else bf16 where
    the dtype is left to a CPU, else exact)"""
    compression: Compression | None = None
    """of snapshots, without loss; zstd needs kvlink-rag[zstd] (the collection's, else none)"""

    def limits(self) -> dict[str, Any]:
        """How files are read, as `ingest` and the estimates take it."""
        return {
            "max_tokens": self.passage_tokens,
            "max_bytes": self.max_file_size,
            "encoding": self.encoding,
            "text_key": self.text_key,
        }


def index(
    paths: Paths,
    /,
    *,
    reading: Reading = Reading(),
    size_limit: Size | None = None,
    budget: Budget | None = None,
    search: Search | None = None,
    sync: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    yes: bool = False,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Take files into the collection.

    Reads files and folders, splits them into passages, encodes each. A file that was indexed
    before, by whatever path, is brought up to date; what is unchanged costs nothing. An
    interrupted run is finished by repeating it. What cannot be read is reported, counted and
    skipped. Passages of files that are no more, or that moved, are told, and stay unless --sync is
    given. Says first what the snapshots will take, and asks where that is more than a tenth of the
    free disk. Exit code 1: nothing could be read, or, with --strict, not everything.

    Args:
        sync: also remove passages of files in these folders that are no more, or that moved (what
            they say is not encoded again)
        dry_run: only say what would be done
        size_limit: most bytes of snapshots to keep: 20GB
        budget: what snapshots may take before they are asked for: a share of the disk that would be
            free without them, bytes (20GB), or none for no bound; the rest is encoded when asked
            for (the collection's, else 50%)
        yes: ask nothing
        search: how passages are found: exact, in lists (ivf: sooner, may miss one), or by size
            (the collection's, else auto)
        strict: fail at the first file or line that cannot be read
        as_json: print the summary as JSON
    """
    problems = Problems(strict=strict)
    files = find(paths, problems)
    if not files and not has_collection(options):
        return 1
    settings = {
        "size_limit": size_limit,
        "budget": budget,
        "codec": reading.codec,
        "compression": reading.compression,
        "search": search,
    }
    opened = collection(options, create=True, models=True, **settings)
    with _trial(options) if dry_run else opened as rag:
        from kvlink_rag.ingest.index_files import ingest

        load(rag, embedder=False)
        if not dry_run and not _may_take(rag, files, reading, yes=yes):
            raise ConfigError("nothing was indexed; give more room, a smaller --codec, or --yes")
        with terminal.progress(sum(file.size() for file in files), "indexing") as bar:
            problems.write = bar.write
            report = ingest(
                rag,
                files,
                on_problem=problems,
                advance=bar.update,
                **reading.limits(),
                roots=[path for path in paths if path],
                sync=sync,
                dry_run=dry_run,
            )
        if as_json:
            terminal.show_json(_fields(rag, report, problems.skipped))
        else:
            terminal.show(_lines(rag, report, problems.skipped, dry_run=dry_run))
            _tell_gone(report, sync=sync, dry_run=dry_run)
    return 1 if problems.skipped and not report.documents else 0


def _may_take(rag: KVLinkRAG, files: Sequence[SourceFile], reading: Reading, *, yes: bool) -> bool:
    """Say what the snapshots will take; where that is much, whether the person there agrees."""
    from kvlink_rag.ingest.estimate import bytes_at_most, new_bytes

    free = free_bytes(rag.directory)
    if bytes_at_most(rag, files) <= free * MUCH:
        return True
    with terminal.doing("reading the files to see what their snapshots will take"):
        planned = new_bytes(rag, files, **reading.limits())
    stats = rag.stats()
    taken = planned if stats.room is None else min(planned, stats.room)
    terminal.note(
        f"their snapshots take {size(planned)}, of which the budget ({stats.budget}) lets "
        f"{size(taken)} be made now; {size(free)} of the disk are free"
    )
    return taken <= free * MUCH or yes or terminal.agreed("go on?")


@contextmanager
def _trial(options: Options) -> Iterator[KVLinkRAG]:
    """The collection as it is, or an empty one for a while where there is none yet."""
    if options.reencode:
        raise ConfigError("--dry-run changes nothing, and --reencode does; leave one of them out")
    with TemporaryDirectory(prefix="kvlink-trial-") as empty:
        there = has_collection(options)
        directory = options if there else replace(options, dir=empty)
        with collection(directory, create=not there, models=True) as rag:
            yield rag


class Problems:
    """Reports each problem in a line as it comes; strict: raises for what must be skipped."""

    def __init__(self, *, strict: bool) -> None:
        self.skipped = 0
        self.write: Any = lambda text, file: file.write(text + "\n")
        self._strict = strict

    def __call__(self, problem: Problem) -> None:
        if self._strict and problem.skipped:
            raise_or_log(problem)
        self.skipped += problem.skipped
        kind = "skipped" if problem.skipped else "warning"
        self.write(terminal.visible(f"kvlink-rag: {kind}: {problem}"), file=sys.stderr)


def told_skipped(skipped: int) -> list[str]:
    """A line for what could not be read, if there was any."""
    return [f"{number(skipped, 'file, line or page', 'files, lines or pages')} skipped"][:skipped]


def _fields(rag: KVLinkRAG, report: IngestReport, skipped: int) -> dict[str, Any]:
    seen = rag.stats()
    keys = ("documents", "snapshots", "snapshot_bytes", "bytes_per_token")
    held = {key: getattr(seen, key) for key in keys}
    return {**report.to_dict(), "skipped": skipped, "collection": held}


def _lines(rag: KVLinkRAG, report: IngestReport, skipped: int, *, dry_run: bool) -> Iterator[str]:
    """A report for people."""
    repeated = f" ({report.repeated:,} repeated)" if report.repeated else ""
    yield (
        f"{number(report.files, 'file')}, {number(report.documents, 'document')}, "
        f"{number(report.passages, 'passage')}{repeated}: {report.added:,} added, "
        f"{report.replaced:,} replaced, {report.unchanged:,} unchanged, "
        f"{report.removed:,} removed"
    )
    yield from told_skipped(skipped)
    if dry_run:
        yield "nothing was changed: this is what would be done"
        return
    seen = rag.stats()
    rate = f", {report.tokens / report.seconds:,.0f} a second" if report.tokens else ""
    yield (
        f"{number(report.encoded, 'snapshot')} encoded: {number(report.tokens, 'token')} in "
        f"{report.seconds:.1f} s{rate}"
    )
    if report.deferred:
        yield f"{number(report.deferred, 'passage')} left for when they are asked for"
    yield (
        f"{rag.directory} holds {number(seen.documents, 'passage')}; snapshots "
        f"{size(seen.snapshot_bytes)}, {size(seen.bytes_per_token)} a token"
    )


def _tell_gone(report: IngestReport, *, sync: bool, dry_run: bool) -> None:
    """Files that are no more, and with `sync` those that moved; without it, `ingest` warned."""
    verb = "would be removed" if dry_run else "are removed"
    if report.gone:
        what = f"passages of {number(len(report.gone), 'file')} that {_are(report.gone)} no more"
        stay = "stay; drop them with --sync, or with: kvlink-rag delete --source PATH"
        terminal.note(f"{what} ({_some(report.gone)}) {verb if sync else stay}")
    if report.moved and sync:
        moves = [f"{old} to {new}" for old, new in report.moved]
        terminal.note(f"moved: {_some(moves)}; passages of the old {verb}")


def _are(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _some(names: Sequence[str]) -> str:
    """The first few of `names`."""
    return ", ".join([*names[:SHOWN], *["…"][: len(names) - SHOWN]])
