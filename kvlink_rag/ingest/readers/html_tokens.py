"""HTML to tags and text, as the HTML standard cuts it (WHATWG, 13.2.5 Tokenization).

Linear in the page, whatever it holds. Two things differ, so that no page is lost whole: a comment,
quote, title or text area without an end does not reach to the end of the page, and an unfinished
tag there is text. Knows no element's meaning but those whose content is no markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import unescape


@dataclass(frozen=True, slots=True)
class Start:
    """A start tag: name and attribute names in lower case. closed: it ends in "/>"."""

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    closed: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """An end tag."""

    name: str


Token = Start | End | str

_MARKUP = re.compile(r"<(?=[a-zA-Z/!?])")
_TAG_NAME = re.compile(r"</?([a-zA-Z][^\s/>]*)")
_ATTRIBUTE_NAME = re.compile(r"[\s/]*([^\s/>][^\s/>=]*)?\s*")
_VALUE = re.compile(r"=\s*")
_BARE = re.compile(r"[^\s>]*")
_COMMENT_END = re.compile(r"--!?>")
# Elements whose content is no markup: without references to characters, and with them.
_RAW = frozenset(("script", "style", "xmp", "iframe", "noembed", "noframes"))
_TEXT_ONLY = frozenset(("title", "textarea"))


def tokens(page: str) -> Iterator[Token]:
    """The tags and texts of `page`, without comments and declarations."""
    yield from _Tokenizer(page).run()


class _Tokenizer:
    def __init__(self, page: str) -> None:
        self._page, self._at = page, 0
        self._xml = page[:200].lstrip("\ufeff \t\r\n").startswith("<?xml")
        self._missing: set[str] = set()  # ends that are not found any more from here on

    def run(self) -> Iterator[Token]:
        page = self._page
        while self._at < len(page):
            found = _MARKUP.search(page, self._at)
            place = found.start() if found else len(page)
            if place > self._at:
                yield unescape(page[self._at : place])
            self._at = place
            if found:
                yield from self._markup()

    def _markup(self) -> Iterator[Token]:
        """What begins with "<" here."""
        name = _TAG_NAME.match(self._page, self._at)
        if name is None:
            yield from self._no_tag()
            return
        start, self._at = self._at, name.end()
        attributes = self._attributes()
        if self._at > len(self._page):  # unfinished at the end of the page
            yield unescape(self._page[start:])
        elif self._page[start + 1] == "/":
            yield End(name[1].lower())
        else:
            closed = self._page[self._at - 2] == "/"
            tag = Start(name[1].lower(), attributes, closed)
            yield tag
            if not (closed and self._xml):
                yield from self._content(tag.name)
            elif tag.name != "br":
                yield End(tag.name)

    def _no_tag(self) -> Iterator[Token]:
        """A comment, a declaration, or CDATA, which is text."""
        page, at = self._page, self._at
        if page.startswith("<![CDATA[", at) and (stop := self._find("]]>", at + 9)) >= 0:
            yield page[at + 9 : stop]
            self._at = stop + 3
            return
        if page.startswith("<!--", at) and "-->" not in self._missing:
            if end := _COMMENT_END.search(page, at + 2):
                self._at = end.end()
                return
            self._missing.add("-->")
        stop = self._find(">", at + 2)
        if stop >= 0:
            self._at = stop + 1
        else:
            yield unescape(page[at:])
            self._at = len(page)

    def _attributes(self) -> dict[str, str]:
        """Up to the tag's ">", and past it; beyond the page where there is none."""
        page = self._page
        found: dict[str, str] = {}
        while True:
            name = _ATTRIBUTE_NAME.match(page, self._at)
            self._at = name.end() if name else self._at
            if self._at >= len(page):
                self._at = len(page) + 1
                return found
            key, value = name[1] if name else None, ""
            if key is not None and (equals := _VALUE.match(page, self._at)):
                self._at = equals.end()
                value = self._value()
            if key is not None:
                found.setdefault(key.lower(), unescape(value))
            elif page[self._at] == ">":
                self._at += 1
                return found

    def _value(self) -> str:
        page, at = self._page, self._at
        quote = page[at : at + 1]
        if quote and quote in "\"'" and (stop := self._find(quote, at + 1)) >= 0:
            self._at = stop + 1
            return page[at + 1 : stop]
        bare = _BARE.match(page, at)
        self._at = bare.end() if bare else at
        return page[at : self._at]

    def _content(self, name: str) -> Iterator[Token]:
        """The content of an element that holds no markup, up to its end tag."""
        if name == "plaintext":
            yield self._page[self._at :]
            self._at = len(self._page)
        if (name not in _RAW and name not in _TEXT_ONLY) or name in self._missing:
            return
        end = re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE).search(self._page, self._at)
        if end is None:
            self._missing.add(name)
            if name in ("script", "style"):
                self._at = len(self._page)
            return
        text = self._page[self._at : end.start()]
        self._at = end.start()
        if text:
            yield unescape(text) if name in _TEXT_ONLY else text

    def _find(self, what: str, start: int) -> int:
        """Where `what` is from `start` on, or -1; not looked for again where it was missing."""
        place = -1 if what in self._missing else self._page.find(what, start)
        if place < 0:
            self._missing.add(what)
        return place
