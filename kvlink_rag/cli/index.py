"""`kvlink-rag index`: files into the collection."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from kvlink_rag.arguments import Bf16, Codec, Compression, Search
from kvlink_rag.ingest.readers import MAX_BYTES, SUFFIXES, Problem, find, raise_or_log
from kvlink_rag.ingest.splitter import MAX_TOKENS
from kvlink_rag.quantities import number, size

from . import terminal
from .opening import OPTIONS, Options, collection
from .values import Count, Json, Size

if TYPE_CHECKING:
    from kvlink_rag.collection.rag import KVLinkRAG
    from kvlink_rag.ingest.index_files import IngestReport

RESUMES = True  # an interrupted run is finished by repeating it
GONE_SHOWN = 3

Paths = Annotated[
    tuple[str, ...], Parameter(name="PATH", help=f"files ({', '.join(SUFFIXES)}) and folders")
]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read, and what becomes of it."""

    passage_tokens: Count = MAX_TOKENS
    """the most tokens of a passage"""
    max_file_size: Annotated[Size, Parameter(show_default=lambda value: "64MB")] = MAX_BYTES
    """of a file, or of a line of a .jsonl file"""
    codec: Codec | Bf16 | None = None
    """of snapshots: exact (bf16 too), or smaller at a price, see verify (the collection's)"""
    compression: Compression | None = None
    """of snapshots, without loss; zstd needs kvlink-rag[zstd] (the collection's, else none)"""


def index(
    paths: Paths,
    /,
    *,
    reading: Reading = Reading(),
    size_limit: Size | None = None,
    search: Search | None = None,
    strict: bool = False,
    as_json: Json = False,
    options: Options = OPTIONS,
) -> int:
    """Take files into the collection.

    Reads files and folders, splits them into passages, encodes each. A file that was indexed
    before (a file is known by its path as given) is brought up to date; what is unchanged costs
    nothing. An interrupted run is finished by repeating it. What cannot be read is reported,
    counted and skipped. Exit code 1: nothing could be read, or, with --strict, not everything.

    Args:
        size_limit: most bytes of snapshots to keep: 20GB
        search: how passages are found: exact, in lists (ivf: sooner, may miss one), or by size
            (the collection's, else auto)
        strict: fail at the first file or line that cannot be read
        as_json: print the summary as JSON
    """
    problems = Problems(strict=strict)
    files = find(paths, problems)
    if not files:
        return 1
    with (
        collection(
            options,
            create=True,
            size_limit=size_limit,
            codec=reading.codec,
            compression=reading.compression,
            search=search,
        ) as rag,
        terminal.progress(sum(file.size() for file in files), "indexing") as bar,
    ):
        from kvlink_rag.ingest.index_files import gone, ingest

        problems.write = bar.write
        if notice := rag.model.spec.notice:
            bar.write(terminal.visible(f"kvlink-rag: {notice}"), file=sys.stderr)
        report = ingest(
            rag,
            files,
            on_problem=problems,
            advance=bar.update,
            max_tokens=reading.passage_tokens,
            max_bytes=reading.max_file_size,
        )
        bar.close()
        read = {file.source for file in files}  # of a name that is no Unicode, not its path
        report.gone = [source for source in gone(rag, paths) if source not in read]
        _show(rag, report, problems.skipped, as_json=as_json)
    return 1 if problems.skipped and not report.documents else 0


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


def _show(rag: KVLinkRAG, report: IngestReport, skipped: int, *, as_json: bool) -> None:
    seen = rag.stats()
    if as_json:
        keys = ("documents", "snapshots", "snapshot_bytes", "bytes_per_token")
        held = {key: getattr(seen, key) for key in keys}
        terminal.show_json({**report.to_dict(), "skipped": skipped, "collection": held})
        return
    repeated = f" ({report.repeated:,} repeated)" if report.repeated else ""
    rate = f", {report.tokens / report.seconds:,.0f} a second" if report.tokens else ""
    terminal.show(
        [
            f"{number(report.files, 'file')}, {number(report.documents, 'document')}, "
            f"{number(report.passages, 'passage')}{repeated}: {report.added:,} added, "
            f"{report.replaced:,} replaced, {report.unchanged:,} unchanged, "
            f"{report.removed:,} removed",
            *told_skipped(skipped),
            f"{number(report.encoded, 'snapshot')} encoded: {number(report.tokens, 'token')} in "
            f"{report.seconds:.1f} s{rate}",
            f"{rag.directory} holds {number(seen.documents, 'passage')}; snapshots "
            f"{size(seen.snapshot_bytes)}, {size(seen.bytes_per_token)} a token",
        ]
    )
    if report.gone:
        shown = [*report.gone[:GONE_SHOWN], *["…"][: len(report.gone) - GONE_SHOWN]]
        terminal.note(
            f"passages of {number(len(report.gone), 'file')} that are no more are kept: "
            f"{', '.join(shown)}; drop them with: kvlink-rag delete --source PATH"
        )
