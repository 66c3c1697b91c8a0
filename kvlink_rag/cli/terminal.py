"""What people see: numbers, sources and traces as lines of text. Knows no torch and no files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvlink_rag.documents import Document, Hit

# Control characters of documents and answers must not steer the terminal: all but newline and
# tab, and those that turn the direction of what follows.
_STEERING = [
    *(c for c in (*range(0x20), *range(0x7F, 0xA0)) if c not in (0x09, 0x0A)),
    *(*range(0x202A, 0x202F), *range(0x2066, 0x206A)),
]
_HARMLESS = dict.fromkeys(_STEERING, "\N{REPLACEMENT CHARACTER}")


def note(text: str) -> None:
    """A remark beside the output, on stderr."""
    sys.stderr.write(f"kvlink-rag: {visible(text)}\n")
    sys.stderr.flush()


def visible(text: str) -> str:
    """`text` without characters that would steer the terminal."""
    return text.translate(_HARMLESS)


def line(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters."""
    flat = visible(" ".join(text[: 4 * width].split()))
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.3g} TB"


def number(count: float, one: str, many: str = "") -> str:
    """ "1 passage", "2,000 passages"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def plan(fields: Mapping[str, Any]) -> list[str]:
    """A plan for people."""
    exact = "" if fields["codec"] == "exact" else f" as {fields['codec']}"
    most = "up to " if fields["compression"] != "none" else ""
    seconds = fields["seconds"]
    long = f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:,.0f} s"
    return [
        f"{number(fields['files'], 'file')}, {number(fields['documents'], 'document')}, "
        f"{number(fields['passages'], 'passage')}: {number(fields['snapshots'], 'snapshot')} of "
        f"{number(fields['tokens'], 'token')}{exact}",
        f"{most}{size(fields['total_bytes'])}: snapshots {most}{size(fields['snapshot_bytes'])}, "
        f"catalog and index {size(fields['other_bytes'])}",
        f"about {long} with {fields['model']!r} and {fields['embedder']!r}, at "
        f"{fields['tokens_per_second']:,.0f} tokens a second "
        f"({number(fields['sample_passages'], 'passage')} tried)",
    ]


def place(document: Document) -> str:
    """Where a document is from, and its id."""
    source, page = document.metadata.get("source"), document.metadata.get("page")
    where = [str(source)] if source else []
    where += [f"page {page}"] if page is not None else []
    return ", ".join([*where, f"id {document.id}"])


def sources(hits: Sequence[Hit], start: int = 1) -> Iterator[str]:
    """A line for each hit: number, score, title, place."""
    width = max(40, shutil.get_terminal_size().columns - 1)
    for number, hit in enumerate(hits, start):
        title = hit.document.title or hit.document.text
        head = f"[{number}] {hit.score:.3f}  {line(title, width // 2)}"
        yield f"{head}  ({line(place(hit.document), width)})"


def trace(fields: Mapping[str, Any]) -> list[str]:
    """A trace in two lines: times, then counts."""
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
    ]
    return ["ms: " + ", ".join(times), "; ".join(counts)]
