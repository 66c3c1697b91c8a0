"""Rows to a Markdown table, which the splitter cuts between rows and gives its header again."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError

from .files import Problem, ReadOptions, SourceFile, clean
from .text import empty, markdown_document, texts

_DELIMITERS = ",;\t|"
_LOOK = 16 * 1024  # characters in which the delimiter is looked for
MOST_CELLS = 5_000_000
_BREAK = re.compile(r"\s+")


def read_csv(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """One table, its first row the header, titled by the file's name."""
    for found in texts(file, options):
        if isinstance(found, Problem):
            yield found
            continue
        try:
            table = markdown_table(_rows(found.replace("\0", ""), tab=file.suffix == ".tsv"))
        except (csv.Error, DocumentError) as error:
            yield Problem(file.source, f"cannot be read as a table ({error})")
            continue
        yield markdown_document(table, file.stem, file) if table else empty(file)


def _rows(text: str, *, tab: bool) -> Iterator[list[str]]:
    delimiter = "\t" if tab else _delimiter(text[:_LOOK])
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _delimiter(start: str) -> str:
    """The sign that most lines have equally often."""
    try:
        return csv.Sniffer().sniff(start, _DELIMITERS).delimiter
    except csv.Error:  # one column, or lines that differ
        first = start.partition("\n")[0]
        return max(_DELIMITERS, key=first.count)


def markdown_table(rows: Iterable[Sequence[object]]) -> str:
    """Rows that hold something as lines of a table; no text where none does.

    Cells end at a row's last that is not empty; columns, at the longest row. Raises `DocumentError`
    for more than `MOST_CELLS` cells.
    """
    kept: list[list[str]] = []
    seen = 0
    for row in rows:
        seen += len(row) + 1
        if seen > MOST_CELLS:
            raise DocumentError(f"more than {MOST_CELLS:,} cells; split it")
        cells = [_cell(value) for value in row]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            kept.append(cells)
    if not kept:
        return ""
    width = max(map(len, kept))
    if width == 1:
        return "\n\n".join(cell for (cell,) in kept)
    first, *others = (_line([*cells, *[""] * (width - len(cells))]) for cells in kept)
    return "\n".join([first, _line(["---"] * width), *others])


def _cell(value: object) -> str:
    """A cell's text, on one line and without a sign that would end it."""
    text = "" if value is None else str(value)
    return _BREAK.sub(" ", clean(text)).strip().replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
