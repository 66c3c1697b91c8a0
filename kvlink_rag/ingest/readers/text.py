"""Plain text, code and Markdown files to documents. Knows titles; knows no other format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvlink_rag.documents import Document, as_json
from kvlink_rag.ingest.markdown import headings, without_comments
from kvlink_rag.ingest.splitter import FORMAT_KEY, MARKDOWN

from .encodings import decoded
from .files import Problem, ReadOptions, SourceFile, clean, warned
from .front_matter import front_matter

_TITLE_CHARACTERS = 200
# A heading in reStructuredText: a line, with one of signs under it (and maybe above it).
_RST_TITLE = re.compile(
    r"^(?:(?P<over>[^\w\s])(?P=over)+[ \t]*\n)?[ \t]*(?P<name>\S[^\n]*)\n"
    r"(?P<sign>[^\w\s])(?P=sign)+[ \t]*$",
    re.MULTILINE,
)


def read_text(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """A text as it is, titled by its name."""
    for found in texts(file, options):
        if isinstance(found, Problem):
            yield found
        else:
            yield Document(found, file.stem, metadata={"source": file.source})


def read_code(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """A program as it is, titled by its whole name."""
    for found in texts(file, options):
        if isinstance(found, Problem):
            yield found
        else:
            yield Document(found, clean(file.path.name), metadata={"source": file.source})


def read_rst(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """reStructuredText as it is, titled by its first heading or its name."""
    for found in texts(file, options):
        if isinstance(found, Problem):
            yield found
        else:
            heading = _RST_TITLE.search(found[:_LOOK])
            title = " ".join(heading["name"].split())[:_TITLE_CHARACTERS] if heading else ""
            yield Document(found, title or file.stem, metadata={"source": file.source})


_LOOK = 4096  # characters in which a heading is looked for


def read_markdown(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """A Markdown file, titled by its front matter, its first top heading or its name."""
    for found in texts(file, options):
        if isinstance(found, Problem):
            yield found
            continue
        fields, body = front_matter(found)
        text = without_comments(body)
        if text.strip():
            title = _title(fields) or top_heading(text) or file.stem
            yield markdown_document(text, title, file, fields)
        else:
            yield empty(file)


def markdown_document(
    text: str, title: str, file: SourceFile, fields: Mapping[str, Any] | None = None
) -> Document:
    """A document whose text has Markdown headings, as its metadata tell the splitter."""
    ours = {"source": file.source, FORMAT_KEY: MARKDOWN}
    others = {key: value for key, value in (fields or {}).items() if key != "title"}
    return Document(text, title, metadata={**as_json(others), **ours})


def top_heading(text: str) -> str:
    """The first heading of level 1, or nothing: a lower one names only a part of the text."""
    return next((heading.text for heading in headings(text) if heading.level == 1), "")


def empty(file: SourceFile) -> Problem:
    """The problem of a file without text."""
    return Problem(file.source, "no text in this file", skipped=False)


def texts(file: SourceFile, options: ReadOptions) -> Iterator[str | Problem]:
    """The text of a file, if it has any, and what is to be said of it."""
    data = file.load(options.max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    found = decoded(data, encoding=options.encoding)
    yield from warned(found, file.source)
    if found.text.strip():
        yield clean(found.text)
    elif not found.binary and not found.warning:
        yield empty(file)


def _title(fields: Mapping[str, Any]) -> str:
    title = fields.get("title")
    return "" if title is None else " ".join(str(title).split())[:_TITLE_CHARACTERS]
