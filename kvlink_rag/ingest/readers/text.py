"""Plain text and Markdown files to documents. Knows headings and front matter."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvlink_rag.documents import Document
from kvlink_rag.ingest.splitter import FORMAT_KEY, MARKDOWN, headings

from .files import Problem, SourceFile, decode

_FRONT_MATTER = re.compile(
    r"---[ \t]*\n(?P<fields>[\w-]+:.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL
)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(.+)$", re.MULTILINE)
_TITLE_CHARACTERS = 200


def read_text(file: SourceFile, max_bytes: int) -> Iterator[Document | Problem]:
    """A .txt file, titled by its name."""
    for found in _decoded(file, max_bytes):
        if isinstance(found, Problem):
            yield found
        else:
            yield Document(found, file.stem, metadata={"source": file.source})


def read_markdown(file: SourceFile, max_bytes: int) -> Iterator[Document | Problem]:
    """A Markdown file, titled by its front matter, its first top heading or its name."""
    for found in _decoded(file, max_bytes):
        if isinstance(found, Problem):
            yield found
        else:
            title, text = _without_front_matter(found)
            yield markdown_document(text, title or top_heading(text) or file.stem, file)


def markdown_document(text: str, title: str, file: SourceFile) -> Document:
    """A document whose text has Markdown headings, as its metadata tell `splitting`."""
    return Document(text, title, metadata={"source": file.source, FORMAT_KEY: MARKDOWN})


def top_heading(text: str) -> str:
    """The first heading of level 1, or nothing: a lower one names only a part of the text."""
    return next((heading.text for heading in headings(text) if heading.level == 1), "")


def empty(file: SourceFile) -> Problem:
    """The problem of a file without text."""
    return Problem(file.source, "no text in this file", skipped=False)


def _decoded(file: SourceFile, max_bytes: int) -> Iterator[str | Problem]:
    data = file.load(max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    text, problems = decode(data, file.source)
    yield from problems
    if text.strip():
        yield text
    elif not problems:
        yield empty(file)


def _without_front_matter(text: str) -> tuple[str, str]:
    """The title that YAML front matter gives, and the text after it."""
    matter = _FRONT_MATTER.match(text)
    if matter is None:
        return "", text
    title = _FRONT_TITLE.search(matter["fields"])
    name = title[1].strip().strip("\"'").strip()[:_TITLE_CHARACTERS] if title else ""
    return name, text[matter.end() :]
