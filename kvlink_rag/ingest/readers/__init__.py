"""Files and folders to documents: text, Markdown, HTML, PDF, office files, tables, programs.

A file, line or page that cannot be read is one `Problem` and does not stop the rest. Each format
has its own module here. Documents come whole (a PDF page by page, a book by chapters, a workbook by
sheets); the splitter makes passages of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from os import PathLike
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError, MissingExtra

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
    ".docx": "office.read_docx",
    ".pptx": "office.read_pptx",
    ".xlsx": "office.read_xlsx",
    ".epub": "epub.read_epub",
    ".csv": "tables.read_csv",
    ".tsv": "tables.read_csv",
    ".ipynb": "notebook.read_notebook",
    **dict.fromkeys(CODE, "text.read_code"),
}
_NEEDS = {
    ".pdf": "pdf.require",
    **dict.fromkeys((".docx", ".pptx", ".xlsx"), "office.require"),
}

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
    file) and its place in that: `page`, `slide`, `sheet` or `chapter`. Titles: the first top
    heading, else HTML's <title> or a PDF's title, else the file's name; for JSON lines, the line's.

    on_problem: called with each problem, and reading goes on. Without it, what must be skipped
        raises `DocumentError`, and a warning is logged.
    max_bytes: the most bytes of one file, or of one line of a .jsonl file.
    encoding: of all text, in place of what the files say or look like. text_key: the key under
        which JSON lines have their text.
    Raises `ConfigError` (no such encoding), and `MissingExtra` (see `find`).
    """
    report, options = on_problem or raise_or_log, ReadOptions(max_bytes, encoding, text_key)
    for file in find(paths, report):
        yield from read_file(file, report, options)


def find(paths: Iterable[str | PathLike[str]], on_problem: OnProblem) -> list[SourceFile]:
    """The files that `read_paths` reads, each once.

    Files of a folder whose format needs a package that is missing are one problem. Raises
    `MissingExtra` where such a file is named itself, or there is no other.
    """
    named = [os.fspath(path) for path in paths]
    files, problems = find_files(named, tuple(_READERS))
    for require in sorted({_NEEDS[file.suffix] for file in files if file.suffix in _NEEDS}):
        try:
            _function(require)()
        except MissingExtra as error:
            left_out = [file for file in files if _NEEDS.get(file.suffix) == require]
            files = [file for file in files if file not in left_out]
            if not files or any(os.fspath(file.path) in named for file in left_out):
                raise
            count = "1 file is" if len(left_out) == 1 else f"{len(left_out)} files are"
            problems.append(Problem(left_out[0].source, f"{count} left out: {error}"))
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
