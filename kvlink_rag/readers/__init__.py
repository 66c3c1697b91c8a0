"""Files and folders to documents: .txt, .md, .html, .jsonl and .pdf.

A file, line or page that cannot be read is one `Problem` and does not stop the rest. Each format
has its own module here; `html` alone knows Beautiful Soup and `pdf` alone knows pypdf. Documents
come whole (a PDF page by page); `splitting` makes passages of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from os import PathLike

from ..documents import Document
from ..errors import DocumentError
from . import html, jsonl, pdf, text
from .files import MAX_BYTES, Problem, SourceFile, find_files

__all__ = ["MAX_BYTES", "SUFFIXES", "Problem", "read_paths"]

Reader = Callable[[SourceFile, int], Iterator["Document | Problem"]]

_READERS: dict[str, Reader] = {
    ".txt": text.read_text,
    ".md": text.read_markdown,
    ".markdown": text.read_markdown,
    ".html": html.read_html,
    ".htm": html.read_html,
    ".jsonl": jsonl.read_jsonl,
    ".pdf": pdf.read_pdf,
}
_NEEDS = {".html": html.require, ".htm": html.require, ".pdf": pdf.require}

SUFFIXES = tuple(_READERS)

logger = logging.getLogger(__name__)


def read_paths(
    paths: Iterable[str | PathLike[str]],
    *,
    on_problem: Callable[[Problem], None] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Document]:
    """The documents in `paths`, files or folders, one file after the other.

    Folders are read recursively in the order of names, without hidden files, unknown suffixes and
    loops of links. A document's metadata name its `source` (the path as given, then down to the
    file) and, for a PDF, its `page`. Titles: the first top heading, else HTML's <title> or a PDF's
    title, else the file's name; for JSON lines, the line's.

    on_problem: called with each problem, and reading goes on. Without it, what must be skipped
        raises `DocumentError`, and a warning is logged.
    max_bytes: the most bytes of one file, or of one line of a .jsonl file.
    Raises `MissingExtra` before anything is read where a file needs a package that is missing.
    """
    report = on_problem or _raise_or_log
    files, problems = find_files(paths, SUFFIXES)
    for suffix in sorted({file.suffix for file in files} & set(_NEEDS)):
        _NEEDS[suffix]()
    for problem in problems:
        report(problem)
    for file in files:
        yield from _read(file, report, max_bytes)


def _read(
    file: SourceFile, report: Callable[[Problem], None], max_bytes: int
) -> Iterator[Document]:
    try:
        for found in _READERS[file.suffix](file, max_bytes):
            if isinstance(found, Problem):
                report(found)
            else:
                yield found
    except OSError as error:
        report(Problem(file.source, f"cannot be read: {error.strerror or error}"))


def _raise_or_log(problem: Problem) -> None:
    if problem.skipped:
        raise DocumentError(str(problem))
    logger.warning("%s", problem)
