"""Files and folders to documents: text, Markdown, HTML, JSON lines, PDF and programs.

A file, line or page that cannot be read is one `Problem` and does not stop the rest. Each format
has its own module here; `pdf` alone knows pypdf. Documents come whole (a PDF page by page); the
splitter makes passages of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from os import PathLike
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError

from .files import MAX_BYTES, Problem, ReadOptions, SourceFile, find_files

__all__ = [
    "MAX_BYTES",
    "SUFFIXES",
    "OnProblem",
    "Problem",
    "ReadOptions",
    "SourceFile",
    "find",
    "raise_or_log",
    "read_file",
    "read_paths",
]

Reader = Callable[[SourceFile, ReadOptions], Iterator["Document | Problem"]]
OnProblem = Callable[[Problem], None]

# Programs, and their settings, that are text as they are.
CODE = (
    ".py",
    ".pyi",
    ".js",
    ".mjs",
    ".jsx",
    ".ts",
    ".tsx",
    ".java",
    ".kt",
    ".scala",
    ".go",
    ".rs",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cs",
    ".swift",
    ".rb",
    ".php",
    ".pl",
    ".lua",
    ".r",
    ".jl",
    ".sh",
    ".bash",
    ".zsh",
    ".ps1",
    ".sql",
    ".toml",
    ".yaml",
    ".yml",
    ".ini",
    ".cfg",
    ".proto",
    ".tex",
)
# Where each is read: a module here and its function, imported when the first such file comes, so
# that whoever only asks for suffixes needs no parser.
_READERS = {
    ".txt": "text.read_text",
    ".md": "text.read_markdown",
    ".markdown": "text.read_markdown",
    ".rst": "text.read_rst",
    ".html": "html.read_html",
    ".htm": "html.read_html",
    ".xhtml": "html.read_html",
    ".jsonl": "jsonl.read_jsonl",
    ".ndjson": "jsonl.read_jsonl",
    ".pdf": "pdf.read_pdf",
    **dict.fromkeys(CODE, "text.read_code"),
}
_NEEDS = {".pdf": "pdf.require"}

SUFFIXES = tuple(suffix for suffix in _READERS if suffix not in CODE)  # … and programs

logger = logging.getLogger(__name__)


def read_paths(
    paths: Iterable[str | PathLike[str]],
    *,
    on_problem: OnProblem | None = None,
    max_bytes: int = MAX_BYTES,
    encoding: str | None = None,
    text_key: str = "text",
) -> Iterator[Document]:
    """The documents in `paths`, files or folders, one file after the other.

    Folders are read recursively in the order of names, without hidden files, unknown suffixes and
    loops of links. A document's metadata name its `source` (the path as given, then down to the
    file) and, for a PDF, its `page`. Titles: the first top heading, else HTML's <title> or a PDF's
    title, else the file's name; for JSON lines, the line's.

    on_problem: called with each problem, and reading goes on. Without it, what must be skipped
        raises `DocumentError`, and a warning is logged.
    max_bytes: the most bytes of one file, or of one line of a .jsonl file.
    encoding: of all text, in place of what the files say or look like. text_key: the key under
        which JSON lines have their text.
    Raises `ConfigError` (no such encoding), and `MissingExtra` before anything is read where a
    file needs a package that is missing.
    """
    report, options = on_problem or raise_or_log, ReadOptions(max_bytes, encoding, text_key)
    for file in find(paths, report):
        yield from read_file(file, report, options)


def find(paths: Iterable[str | PathLike[str]], on_problem: OnProblem) -> list[SourceFile]:
    """The files that `read_paths` reads, each once. Raises `MissingExtra`."""
    files, problems = find_files(paths, tuple(_READERS))
    for suffix in sorted({file.suffix for file in files} & set(_NEEDS)):
        _function(_NEEDS[suffix])()
    for problem in problems:
        on_problem(problem)
    return files


def read_file(
    file: SourceFile, on_problem: OnProblem, options: ReadOptions | None = None
) -> Iterator[Document]:
    """The documents of one file."""
    try:
        reader: Reader = _function(_READERS[file.suffix])
        for found in reader(file, options or ReadOptions()):
            if isinstance(found, Problem):
                on_problem(found)
            else:
                yield found
    except OSError as error:
        on_problem(Problem(file.source, f"cannot be read: {error.strerror or error}"))


def _function(name: str) -> Any:
    module, _, function = name.partition(".")
    return getattr(import_module(f".{module}", __name__), function)


def raise_or_log(problem: Problem) -> None:
    """Raise `DocumentError` for what must be skipped; log a warning."""
    if problem.skipped:
        raise DocumentError(str(problem))
    logger.warning("%s", problem)
