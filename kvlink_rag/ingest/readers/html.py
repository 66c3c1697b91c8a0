"""HTML files to documents, as Markdown: headings stay headings, code stays code.

The only module that knows Beautiful Soup (extra `html`). Scripts, styles and navigation are
dropped. The walk keeps its own stack, so that hostile nesting does not exhaust Python's.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import MissingExtra

from .files import Problem, SourceFile, clean, is_binary, marked_encoding, not_text
from .text import empty, markdown_document, top_heading

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

# fmt: off
_DROPPED = frozenset((
    "head", "script", "style", "nav", "noscript", "template", "svg", "math", "iframe", "object",
    "canvas", "audio", "video", "map", "select", "button", "input",
))
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details",
    "dialog", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "header",
    "hr", "html", "legend", "li", "main", "menu", "ol", "p", "section", "summary", "table",
    "tbody", "tfoot", "thead", "tr", "ul", *_HEADINGS,
))
# fmt: on
_TIGHT = frozenset(("li", "tr", "dt", "dd"))  # one line each, without blank lines between
_SPACE = re.compile(r"[ \t\r\n\f]+")
# A line of text that Markdown would take for a heading, an underline or a fence.
_MARKDOWN = re.compile(r"^(?= {0,3}(?:#{1,6}[ \t]|`{3}|~{3}|=+[ \t]*$|-{2,}[ \t]*$))", re.MULTILINE)
_TITLE_CHARACTERS = 200
# Codecs that no declaration may name: not wide ones, whose declaration could not be read, nor
# Python's own, some of which take quadratic time.
_NO_CHARSET = re.compile(r"utf-(16|32|7)|idna|punycode|.*escape|undefined")


def require() -> None:
    """Raise `MissingExtra` if Beautiful Soup is not installed."""
    if find_spec("bs4") is None:
        raise MissingExtra.of("beautifulsoup4", "html", "reading .html files")


def read_html(file: SourceFile, max_bytes: int) -> Iterator[Document | Problem]:
    """One document: titled by its <h1>, its <title> or the file's name."""
    data = file.load(max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    try:
        page, replaced = _decode(data)
        if is_binary(page):
            yield not_text(file.source)
            return
        soup = _parse(page)
        text, title = clean(_to_markdown(soup)), _page_title(soup)
    except Exception as error:  # the parsers raise much else than they document
        yield Problem(file.source, f"cannot be read as HTML ({type(error).__name__}: {error})")
        return
    if replaced:
        message = "characters that are not in its encoding were replaced by U+FFFD"
        yield Problem(file.source, message, skipped=False)
    if text:
        yield markdown_document(text, top_heading(text) or title or file.stem, file)
    else:
        yield empty(file)


def _decode(data: bytes) -> tuple[str, bool]:
    """The page as text, and whether characters were replaced.

    By byte order mark, declaration, UTF-8 or Windows-1252: as the HTML standard has it, without
    guessing by statistics, which is wrong on short pages.
    """
    from bs4.dammit import EncodingDetector

    marked = marked_encoding(data)
    declared = EncodingDetector.find_declared_encoding(data, is_html=True) or "utf-8"
    for encoding in () if marked else (declared, "utf-8"):
        with contextlib.suppress(LookupError, UnicodeError):
            if not _NO_CHARSET.match(codecs.lookup(encoding).name):
                return data.decode(encoding), False
    text = data.decode(marked or "windows-1252", errors="replace")
    return text, "\N{REPLACEMENT CHARACTER}" in text


def _parse(page: str) -> BeautifulSoup:
    """The page's tree. An unfinished tag at its end is text.

    Left as they are, thousands of unfinished tags cost Python's HTML parser quadratic time.
    """
    from bs4 import BeautifulSoup

    end = page.rfind(">") + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XHTML and about texts that look like file names
        return BeautifulSoup(page[:end] + page[end:].replace("<", "&lt;"), "html.parser")


def _page_title(soup: BeautifulSoup) -> str:
    title = soup.title.get_text() if soup.title else ""
    return clean(_SPACE.sub(" ", title).strip())[:_TITLE_CHARACTERS]


def _to_markdown(soup: BeautifulSoup) -> str:
    from bs4 import Tag
    from bs4.element import PreformattedString

    writer = _Writer()
    todo: list[Any] = [soup]  # nodes to visit, and the names of elements to close
    while todo:
        node = todo.pop()
        if isinstance(node, _Close):
            writer.close(node)
        elif isinstance(node, Tag):
            todo += reversed(_enter(node, writer))
        elif not isinstance(node, PreformattedString):  # comments, declarations
            writer.add(_SPACE.sub(" ", str(node)))
    return writer.text()


class _Close(str):
    """The name of an element whose end was reached."""


def _enter(element: Any, writer: _Writer) -> list[Any]:
    """Open `element`; what to visit for it."""
    name = element.name
    if name in _DROPPED or element.has_attr("hidden"):
        return []
    if name == "pre":
        writer.code(element.get_text())
        return []
    writer.open(name)
    return [*element.children, _Close(name)]


class _Writer:
    """Blocks of Markdown, one after the other, from elements as they open and close."""

    def __init__(self) -> None:
        self._blocks: list[tuple[str, bool]] = []  # text, and whether it is a line of a list
        self._inline: list[str] = []
        self._mark = ""
        self._tight = False

    def add(self, text: str) -> None:
        """Text within the block."""
        self._inline.append(text)

    def open(self, name: str) -> None:
        """An element begins."""
        if name == "br":
            self._inline.append("\n")
        elif name in _BLOCKS:
            self._end_block()
            self._tight = self._tight or name in _TIGHT
            self._mark = _HEADINGS.get(name) or ("- " if name == "li" else self._mark)

    def close(self, name: str) -> None:
        """An element ends."""
        if name in ("td", "th"):
            self._inline.append(" | ")
        elif name in _BLOCKS:
            self._end_block()
            self._tight, self._mark = False, ""

    def code(self, text: str) -> None:
        """A block kept as it is, in a fence longer than any inside it."""
        self._end_block()
        longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
        fence = "`" * (longest + 1)
        if text.strip():
            code = text.strip("\n")
            self._blocks.append((f"{fence}\n{code}\n{fence}", False))

    def text(self) -> str:
        """All blocks, with blank lines between them."""
        self._end_block()
        pieces: list[str] = []
        before = False
        for block, tight in self._blocks:
            pieces.append("" if not pieces else "\n" if tight and before else "\n\n")
            pieces.append(block)
            before = tight
        return "".join(pieces)

    def _end_block(self) -> None:
        lines = "".join(self._inline).split("\n")
        text = "\n".join(_tidy(line) for line in lines).strip()
        self._inline.clear()
        if not text:
            return
        heading = self._mark.startswith("#")
        text = text.replace("\n", " ") if heading else _MARKDOWN.sub(r"\\", text)
        self._blocks.append((self._mark + text, self._tight))
        self._mark = ""


def _tidy(line: str) -> str:
    """A line with single spaces, and without the mark after a table's last cell."""
    return _SPACE.sub(" ", line).strip().removesuffix("|").rstrip()
