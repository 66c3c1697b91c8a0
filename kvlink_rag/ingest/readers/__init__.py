"""Files and folders to documents: .txt, .md, .html, .jsonl and .pdf.

A file, line or page that cannot be read is one `Problem` and does not stop the rest. Each format
has its own module here; `html` alone knows Beautiful Soup and `pdf` alone knows pypdf. Documents
come whole (a PDF page by page); `splitting` makes passages of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from os import PathLike

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError

from . import html, jsonl, pdf, text
from .files import MAX_BYTES, Problem, SourceFile, find_files

__all__ = [
    "MAX_BYTES",
    "SUFFIXES",
    "OnProblem",
    "Problem",
    "SourceFile",
    "find",
    "raise_or_log",
    "read_file",
    "read_paths",
]

Reader = Callable[[SourceFile, int], Iterator["Document | Problem"]]
OnProblem = Callable[[Problem], None]

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
    on_problem: OnProblem | None = None,
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
    report = on_problem or raise_or_log
    for file in find(paths, report):
        yield from read_file(file, report, max_bytes)


def find(paths: Iterable[str | PathLike[str]], on_problem: OnProblem) -> list[SourceFile]:
    """The files that `read_paths` reads, each once. Raises `MissingExtra`."""
    files, problems = find_files(paths, SUFFIXES)
    for suffix in sorted({file.suffix for file in files} & set(_NEEDS)):
        _NEEDS[suffix]()
    for problem in problems:
        on_problem(problem)
    return files


def read_file(
    file: SourceFile, on_problem: OnProblem, max_bytes: int = MAX_BYTES
) -> Iterator[Document]:
    """The documents of one file."""
    try:
        for found in _READERS[file.suffix](file, max_bytes):
            if isinstance(found, Problem):
                on_problem(found)
            else:
                yield found
    except OSError as error:
        on_problem(Problem(file.source, f"cannot be read: {error.strerror or error}"))


def raise_or_log(problem: Problem) -> None:
    """Raise `DocumentError` for what must be skipped; log a warning."""
    if problem.skipped:
        raise DocumentError(str(problem))
    logger.warning("%s", problem)
