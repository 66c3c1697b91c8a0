"""HTML files to documents, as Markdown. Knows what a page declares; knows no tags."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvlink_rag.documents import Document

from .encodings import WESTERN, Decoded, declared_as, decoded
from .files import Problem, ReadOptions, SourceFile, clean, not_text, warned
from .html_text import to_markdown
from .text import empty, markdown_document, top_heading

_TITLE_CHARACTERS = 200
_MOST_TAGS = 1_500_000  # the largest real pages have about half of that
_DECLARED_WITHIN = 4096  # bytes; browsers look at 1024
_XML = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']\s*([\w.:-]+)""")
_META = re.compile(rb"""<meta[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)


def read_html(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """One document: titled by its <h1>, its <title> or the file's name."""
    data = file.load(options.max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    found = _decoded(data, options.encoding)
    yield from warned(found, file.source)
    if not found.binary:
        yield from list(_page(found.text, file.source, file)) or [empty(file)]


def read_page(data: bytes, place: str, file: SourceFile) -> Iterator[Document | Problem]:
    """A page inside a file, `place` for people; nothing where it says nothing."""
    found = _decoded(data, None)
    if found.binary:
        yield not_text(place)
    else:
        yield from _page(found.text, place, file)


def _page(html: str, place: str, file: SourceFile) -> Iterator[Document | Problem]:
    if html.count("<") > _MOST_TAGS:
        yield Problem(place, f"more than {_MOST_TAGS:,} tags in one page; split it")
        return
    page = to_markdown(html)
    if not page.text and (page := to_markdown(html, whole=True)).text:
        message = "all of its text is navigation, or hidden; read all the same"
        yield Problem(place, message, skipped=False)
    text, title = clean(page.text), clean(page.title)[:_TITLE_CHARACTERS]
    if text:
        yield markdown_document(text, top_heading(text) or title or file.stem, file)


def _decoded(data: bytes, encoding: str | None) -> Decoded:
    """By the name given, a byte order mark, the page's own declaration, or what it looks like."""
    start = data[:_DECLARED_WITHIN]
    label = _XML.match(start) or _META.search(start)
    declared = declared_as(label[1].decode("ascii")) if label else None
    found = decoded(data, encoding=encoding, declared=declared)
    # Pages that do not say are Windows-1252, by the standard: nothing to warn of.
    return Decoded(found.text) if found.guess == WESTERN and not found.binary else found
