"""What people see: lines, sources, traces, progress. Knows no torch and no files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvlink_rag.documents import Document, Hit
from kvlink_rag.quantities import number

# Control characters of documents and answers must not steer the terminal: all but newline and
# tab, and those that turn the direction of what follows.
_STEERING = [
    *(c for c in (*range(0x20), *range(0x7F, 0xA0)) if c not in (0x09, 0x0A)),
    *(*range(0x202A, 0x202F), *range(0x2066, 0x206A)),
]
_HARMLESS = dict.fromkeys(_STEERING, "\N{REPLACEMENT CHARACTER}")
_CLEAR = "\r\x1b[K"  # the line that the cursor is in
_TITLE = 60  # characters of a title, in a line of a source

Say = Callable[[str], object]


def visible(text: str) -> str:
    """`text` without characters that would steer the terminal."""
    return text.translate(_HARMLESS)


def line(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    flat = visible(" ".join(text[: 4 * width].split()))
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def show(lines: Iterable[str]) -> None:
    """Print `lines`."""
    for each in lines:
        sys.stdout.write(f"{visible(each)}\n")


def show_json(fields: Mapping[str, Any]) -> None:
    """Print `fields` as JSON."""
    sys.stdout.write(json.dumps(fields, indent=2) + "\n")


def show_pieces(pieces: Iterable[str]) -> str:
    """Print an answer as it comes, without a new line after it; the whole answer."""
    said = ""
    for piece in pieces:
        said += piece
        sys.stdout.write(visible(piece))
        sys.stdout.flush()
    return said


def note(text: str) -> None:
    """A remark beside the output, on stderr."""
    sys.stderr.write(f"kvlink-rag: {visible(text)}\n")
    sys.stderr.flush()


def agreed(question: str) -> bool:
    """Whether the person at the terminal says yes; where nobody is there, nobody is asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    sys.stderr.write(f"kvlink-rag: {question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def above(as_json: bool) -> Say:
    """Prints a line at once; to stderr where stdout is for JSON."""
    stream = sys.stderr if as_json else sys.stdout
    return lambda text: print(visible(text), file=stream, flush=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say on a terminal what is being waited for, as long as it lasts."""
    shown = sys.stderr.isatty()
    if shown:
        sys.stderr.write(f"{_CLEAR}kvlink-rag: {line(what, _columns() - 16)} …")
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()


def progress(total: int, what: str) -> Any:
    """A bar over the bytes of files, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)


def place(document: Document) -> str:
    """Where a document is from, and its id."""
    return ", ".join(filter(None, [source(document), f"id {document.id}"]))


def source(document: Document) -> str:
    """The source that a document names, and of a PDF the page; "" where it names none."""
    named, page = document.metadata.get("source"), document.metadata.get("page")
    where = [str(named)] if named else []
    where += [f"page {page}"] if page is not None else []
    return visible(" ".join(", ".join(where).split()))


def sources(hits: Sequence[Hit], start: int = 1) -> Iterator[str]:
    """For each hit its number, title and place, then where else its text is.

    One line, or more where a terminal is too narrow. Ids and sources are whole. No scores: inner
    products of an embedder have no scale of their own.
    """
    for rank, hit in enumerate(hits, start):
        head = f"[{rank}] {line(hit.document.title or hit.document.text, _TITLE)}"
        where = [place(hit.document)]
        if hit.also:
            where.append(f"also {'; '.join(source(d) or f'id {d.id}' for d in hit.also)}")
        whole = f"{head}  ({'; '.join(where)})"
        if sys.stdout.isatty() and len(whole) > _columns():
            yield from (head, *(f"    {each}" for each in where))
        else:
            yield whole


def trace(fields: Mapping[str, Any]) -> list[str]:
    """A trace in two lines: times, then counts and what was computed in."""
    stages = (
        "retrieval",
        "layout",
        "read",
        "encode",
        "assembly",
        "prefill",
        "first_token",
        "total",
    )
    times = [
        f"{s.replace('_', ' ')} {fields[f'{s}_ms']:.1f}" for s in stages if f"{s}_ms" in fields
    ]
    more = fields.get("passages_as_text", 0)
    as_text = f" ({more} more computed as text)" if more else ""
    counts = [
        f"{number(fields['passages'], 'passage')}{as_text}",
        f"tokens: {fields['reused_tokens']:,} reused, {fields['prefix_tokens']:,} kept, "
        f"{fields['computed_tokens']:,} computed, {fields['generated_tokens']:,} generated",
        f"snapshots: {fields['snapshots_found']} found, {fields['snapshots_encoded']} encoded",
        f"computed in {fields['dtype']}"
        + (f", generated with {fields['weights']} weights" if fields["weights"] else ""),
    ]
    return ["ms: " + ", ".join(times), "; ".join(counts)]


def _columns() -> int:
    return max(40, shutil.get_terminal_size().columns)
