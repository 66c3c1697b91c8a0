"""Long text to passages, by tokens: the first step of the life of a document.

A passage is a slice of the text: it ends at a paragraph if that leaves it reasonably full, else
after a sentence, a line, a word, and only then between two graphemes. Passages do not overlap, and
nothing but white space is left out between them; Markdown headings leave the text for the titles,
and a Markdown table or code block that goes on in the next passage repeats its header or fence.
Time is linear in the text. Knows an encoder's `encode`; knows no model, no file and no collection.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import regex

from kvlink_rag.arguments import MAX_TOKENS
from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError

from .markdown import Heading, Repeat, headings, repeats

TITLE_SEPARATOR = " > "
FORMAT_KEY = "format"  # metadata[FORMAT_KEY] == MARKDOWN: the text has Markdown headings
MARKDOWN = "markdown"

_LEAST_FILL = 4  # a border counts if it leaves at least 1/4 of what would have fitted
_CLOSE_ENOUGH = 16  # the search for a full passage ends within 1/16 of the most tokens
_MARGIN = 32  # … and aims a little below it
_REPEATED = 4  # a header or fence is repeated where it takes at most 1/4 of the most tokens


class Encoder(Protocol):
    """What splitting asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""
        ...


def split_text(
    text: str,
    *,
    title: str = "",
    encoder: Encoder,
    max_tokens: int = MAX_TOKENS,
    markdown: bool = False,
) -> list[Document]:
    """Passages of `text`, in order, each of at most `max_tokens` tokens (its title not counted).

    With `markdown`, every heading starts a passage, and a passage's title is the path to it:
    "Guide > Installing > Linux". Only a single character that has more tokens than `max_tokens`
    makes a passage that is larger. Raises `ConfigError` if `max_tokens` is less than 1.
    """
    document = Document(text, title, metadata={FORMAT_KEY: MARKDOWN} if markdown else {})
    parts = split_document(document, encoder, max_tokens)
    return [Document(part.text, part.title) for part in parts]


def split_document(
    document: Document, encoder: Encoder, max_tokens: int = MAX_TOKENS
) -> list[Document]:
    """Passages of `document`, which keep its metadata; its text is Markdown if they say so.

    A document with an id gives that id to its only passage, or `id#1`, `id#2`, … to several.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}, expected at least 1")
    passages = [
        replace(document, text=text, title=section.title)
        for section in _sections(document)
        for text in _fill(section, encoder, max_tokens)
    ]
    if document.id is None or len(passages) < 2:
        return passages
    return [replace(p, id=f"{document.id}#{n}") for n, p in enumerate(passages, 1)]


# ── sections: what stands under one heading ──────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    text: str
    markdown: bool = True


def _sections(document: Document) -> Iterator[_Section]:
    if document.metadata.get(FORMAT_KEY) != MARKDOWN:
        yield _Section(document.title, document.text, markdown=False)
        return
    text, path = document.text, _Path(document.title)
    found = list(headings(text))
    starts = [heading.start for heading in found] + [len(text)]
    yield _Section(path.title, text[: starts[0]])
    for index, heading in enumerate(found):
        path.enter(heading)
        body = text[heading.stop : starts[index + 1]]
        is_parent = heading is not found[-1] and found[index + 1].level > heading.level
        if body.strip() or is_parent:
            yield _Section(path.title, body)
        else:  # no passage below would carry this heading in its title
            yield _Section(path.above, heading.text)


class _Path:
    """The titles above the place where a reader of the document stands."""

    def __init__(self, title: str) -> None:
        self._root = title
        self._open: list[Heading] = []

    def enter(self, heading: Heading) -> None:
        """Go on below `heading`."""
        self._open = [h for h in self._open if h.level < heading.level] + [heading]

    @property
    def title(self) -> str:
        """The document's title and the headings down to here, each named once."""
        return self._joined(self._open)

    @property
    def above(self) -> str:
        """The title of what the last heading stands in."""
        return self._joined(self._open[:-1])

    def _joined(self, headings: Sequence[Heading]) -> str:
        names = [heading.text for heading in headings]
        if self._root and names[:1] != [self._root]:
            names.insert(0, self._root)
        return TITLE_SEPARATOR.join(names)


# ── filling: one slice of the text after another ─────────────────────────────────────────────


def _fill(section: _Section, encoder: Encoder, max_tokens: int) -> Iterator[str]:
    """Slices of the text, without white space around them, of at most `max_tokens` tokens."""
    text = section.text
    window = _Window(text, encoder, max_tokens, repeats(text) if section.markdown else ())
    start = window.skip_space(0)
    while start < len(text):
        stop = window.cut(start)
        yield window.passage(start, stop)
        start = window.skip_space(window.after(stop))


class _Window:
    """Finds where the passage that starts at a place of `text` ends."""

    def __init__(
        self, text: str, encoder: Encoder, max_tokens: int, repeated: Iterable[Repeat]
    ) -> None:
        self._text = text
        self._encode = encoder.encode
        self._most = max_tokens
        self._aim = max_tokens - max_tokens // _MARGIN
        self._guess = 4 * max_tokens  # characters to try first: as many as fitted last time
        cost = max_tokens // _REPEATED
        self._repeats = [r for r in repeated if self._tokens(r.before + r.after) <= cost]
        self._starts = [repeat.start for repeat in self._repeats]

    def skip_space(self, start: int) -> int:
        """The first place from `start` on that is not white space."""
        match = _NOT_SPACE.search(self._text, start)
        return match.start() if match else len(self._text)

    def cut(self, start: int) -> int:
        """The place to end the passage that starts at `start`."""
        limit = self.skip_space(self._furthest(start))
        while True:
            stop = _last_border(self._text, start, limit)
            if stop <= start + 1 or self._count(start, stop) <= self._most:
                return stop
            limit = stop - 1  # rare: a slice may have more tokens than a longer one

    def passage(self, start: int, stop: int) -> str:
        """The slice from `start` to `stop`, with what it repeats of the table or code it is in."""
        whole = self._framed(start, stop)
        bare = self._text[start:stop].rstrip()
        return whole if whole == bare or self._tokens(whole) <= self._most else bare

    def after(self, stop: int) -> int:
        """Where the text goes on: not with the end of a code block that was ended already."""
        inside = self._repeat_at(stop - 1)
        if inside is None or not inside.after or self._text[stop : inside.stop].strip():
            return stop
        return inside.end

    def _framed(self, start: int, stop: int) -> str:
        text = self._text[start:stop].rstrip()
        if not self._repeats:
            return text
        first, last = self._repeat_at(start), self._repeat_at(stop - 1)
        before = first.before if first is not None else ""
        return before + text + (last.after if last is not None else "")

    def _repeat_at(self, place: int) -> Repeat | None:
        """What is repeated where a passage begins or ends at `place`."""
        found = bisect_right(self._starts, place) - 1
        inside = found >= 0 and place < self._repeats[found].stop
        return self._repeats[found] if inside else None

    def _count(self, start: int, stop: int) -> int:
        return self._tokens(self._framed(start, stop))

    def _tokens(self, text: str) -> int:
        return len(self._encode(text))

    def _furthest(self, start: int) -> int:
        """About the furthest place that fits: a search on the number of characters."""
        rest = len(self._text) - start
        fits, too_many, size = 0, rest + 1, min(self._guess, rest)
        for probe in itertools.count(1):
            tokens = self._count(start, start + size)
            fits, too_many = (size, too_many) if tokens <= self._most else (fits, size)
            full = self._most - self._most // _CLOSE_ENOUGH <= tokens <= self._most
            near_end = too_many > rest and rest - fits <= fits // _CLOSE_ENOUGH
            if too_many - fits <= 1 or (full and not near_end):
                break
            by_ratio = rest if full else size * self._aim // max(tokens, 1)
            size = by_ratio if probe % 4 else (fits + too_many) // 2
            size = min(max(size, fits + 1), too_many - 1)
        self._guess = max(fits, 1)
        return start + self._guess


# ── borders: where a slice may end ───────────────────────────────────────────────────────────

_CLOSING = r"""['"”’»」』）〉》】)\]]*"""
_GRAPHEME = regex.compile(r"\X")  # UAX 29, in the version of Unicode that `regex` has
_LONGEST_GRAPHEME = 512  # characters; a longer one may be cut
_NOT_SPACE = re.compile(r"\S")
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*|[\f\u2029]\s*")
_SENTENCE = re.compile(rf"[.!?…]{_CLOSING}\s+|[。！？｡।॥؟۔։።။។]{_CLOSING}\s*")
_LINE = re.compile(r"\n\s*")
_WORD = re.compile(rf"[\s\u200b]+|[、，；：]{_CLOSING}\s*")
# What stands before a full stop that ends no sentence: an initial, an abbreviation, a list number.
_NO_END = re.compile(
    r"(?:\b[^\W\d_]|\b(?:mr|mrs|ms|dr|prof|st|vs|etc|fig|figs|eq|vol|pp|ed|al|cf|approx"
    r"|dept|inc|ltd|jr|sr|gen|col|capt|rev|hon)|(?:^|\n)[ \t]*\d{1,3})\Z",
    re.IGNORECASE,
)


def _last_border(text: str, start: int, limit: int) -> int:
    """The best place in `(start, limit]` to end a slice: the last of the best kind of border."""
    if limit >= len(text):
        return len(text)
    least = start + max((limit - start) // _LEAST_FILL, 1)
    graphemes = _Graphemes(text, start, limit)
    for pattern in (_PARAGRAPH, _SENTENCE, _LINE, _WORD):
        found = [m for m in pattern.finditer(text, start, limit) if m.end() >= least]
        for match in reversed(found):
            ends = pattern is not _SENTENCE or _ends_sentence(text, match)
            if ends and graphemes.end_at(match.end()):
                return match.end()
    return graphemes.last()


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if match[0][0] != ".":
        return True
    before = text[max(0, match.start() - 12) : match.start()]
    return not text[match.end()].islower() and not _NO_END.search(before)


class _Graphemes:
    """Where graphemes end in `(start, limit]`. Read from `start` on, and only if need be."""

    def __init__(self, text: str, start: int, limit: int) -> None:
        self._text, self._start, self._limit = text, start, limit
        self._ends: list[int] | None = None

    def end_at(self, at: int) -> bool:
        """Whether one ends at `at`."""
        before, after = self._text[at - 1], self._text[at]
        if after.isascii() and before.isascii():  # no rule joins these but CR and LF
            return before + after != "\r\n"
        ends = self._all()
        place = bisect_left(ends, at)
        return place < len(ends) and ends[place] == at

    def last(self) -> int:
        """The last end; the limit if there is none."""
        if self.end_at(self._limit):
            return self._limit
        return max(self._all(), default=self._limit)

    def _all(self) -> list[int]:
        """All ends. Whether one is at the limit shows with the character after it."""
        if self._ends is None:
            found = _grapheme_ends(self._text, self._start, self._limit + 1)
            self._ends = [end for end in found if end <= self._limit]
        return self._ends


def _grapheme_ends(text: str, start: int, stop: int) -> Iterator[int]:
    """Where graphemes end, piece by piece: for every flag `regex` reads all flags before it."""
    while start < stop:
        piece = text[start : min(start + _LONGEST_GRAPHEME, stop)]
        ends = [start + match.end() for match in _GRAPHEME.finditer(piece)]
        if len(ends) > 1 and start + len(piece) < stop:
            ends.pop()  # it may go on in the next piece
        yield from ends
        start = ends[-1]
