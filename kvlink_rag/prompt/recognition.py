"""Passages found by their content in a prompt that someone else wrote.

A stretch of the prompt that is verbatim the text of a known passage becomes that `Passage`; all
else stays `Text`. There are no markers that a document could forge. Rules and limits stand in
`docs/architecture.md`. Knows texts, rows and versions; knows neither SQLite nor FAISS, no model.
"""

from __future__ import annotations

import bisect
import logging
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import CatalogError, PromptError
from kvlink_rag.trace import Trace

from .chat import content_parts
from .layout import PartEncoder

MIN_TOKENS = 16
HEAD = 32  # characters of a text that are looked up first
NECK = 256  # characters compared next where at least `CROWD` texts have one head
CROWD = 64
LONGEST = (1 << 24) - 1  # characters; no window holds a longer passage
SELECTIONS = 4  # times that passages are chosen anew without those found glued to something
TITLE = 300  # characters of a title that is looked for before a text
LABEL = 60  # characters of the longest bare label
BARE_LABELS = 4  # that may end a prompt
SEPARATOR = 32  # characters between two passages that need no white space around them
AT_ONCE = 1 << 15  # places of a prompt looked up together
PATIENCE = 1 << 24  # characters and rows looked at for one prompt, besides eight a character
LOOK = 512  # what looking at one place costs of it

Array = npt.NDArray[Any]

logger = logging.getLogger(__name__)


class KnownEntry(Protocol):
    """A document as a catalog holds it."""

    @property
    def row(self) -> int:
        """Its number."""
        ...

    @property
    def document(self) -> Document:
        """The document."""
        ...


class KnownTexts(Protocol):
    """What recognition asks of a catalog."""

    def version(self) -> int:
        """The number of the last change."""
        ...

    def changed_rows(self, version: int) -> tuple[int, list[int]]:
        """The version now, and every row written or deleted after `version`."""
        ...

    def texts(self, rows: Iterable[int]) -> Iterator[tuple[int, str, str, str]]:
        """Row, id, title and text of those `rows` that are there."""
        ...

    def by_rows(self, rows: Iterable[int]) -> Sequence[KnownEntry]:
        """The entries of those `rows` that are there."""
        ...


@dataclass(frozen=True, slots=True)
class Stretch:
    """`prompt[start:stop]`, the stripped text of the documents in `rows`.

    free: whether white space or the prompt's end stands at its start, and at its stop.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    free: tuple[bool, bool] = (True, True)

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Closed:
    """`prompt[start:stop]`, which no passage may overlap; a longer one may hold it if `soft`."""

    start: int
    stop: int
    soft: bool = False

    def forbids(self, start: int, stop: int) -> bool:
        """Whether `[start, stop)` may not become a passage."""
        if stop <= self.start or self.stop <= start:
            return False
        holds = start <= self.start and self.stop <= stop
        return not (self.soft and holds and stop - start > self.stop - self.start)


class Recogniser:
    """Finds the passages of one collection in prompts. Safe to share between threads.

    min_tokens: shorter stretches stay text. most: passages at most, as a model has slots; those
    after them stay text.
    The table of known texts is made at the first call and follows the catalog's changes, whichever
    process made them: 28 bytes a passage.
    """

    def __init__(
        self,
        catalog: KnownTexts,
        tokenizer: PartEncoder,
        *,
        min_tokens: int = MIN_TOKENS,
        most: int | None = None,
    ) -> None:
        self._catalog, self._tokenizer = catalog, tokenizer
        self.min_tokens, self.most = min_tokens, most
        self._table = Table()
        self._lock = threading.Lock()

    def recognise(
        self,
        prompt: str,
        *,
        asks: bool = True,
        question: str | None = None,
        system: Sequence[str] = (),
    ) -> list[Part]:
        """`prompt` as parts: with the stripped text in place of each passage, it is `prompt` again.

        asks: whether the prompt holds the question; `question` is its text, None finds it
        (`find_question`). system: the application's own prompts.
        """
        return self._parts(prompt, asks, question, system, self.most, Trace())

    def _parts(
        self,
        prompt: str,
        asks: bool,
        question: str | None,
        system: Sequence[str],
        most: int | None,
        trace: Trace,
    ) -> list[Part]:
        table = self.refresh()
        closed = [c for text in system for c in self._own(prompt, text)]
        if question is not None:
            closed += occurrences(prompt, question)[-1:]
        matches = self._long_enough(prompt, table.matches(prompt))
        found = select(matches, closed)
        if asks and question is None:
            asked = find_question(prompt, found)
            if inside := [s for s in found if asked.forbids(s.start, s.stop)]:
                start = min(asked.start, *(s.start for s in inside))
                found = select(matches, [*closed, Closed(start, asked.stop)])
        confirmed = self._confirmed(prompt, found, table)
        trace.passages_as_text += len(confirmed[most:]) if most is not None else 0
        return _cut(prompt, confirmed[:most])

    def recognise_contents(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        system: Sequence[str] = (),
        trace: Trace | None = None,
    ) -> list[dict[str, Any]]:
        """`messages` with parts as contents. What the assistant said stays text.

        Every user message that an answer follows holds a question, the last one too, so that a
        later turn changes no earlier one. Passages are counted through all messages, with those
        that contents hold already. trace: counts those beyond `most` in `passages_as_text`.
        """
        trace = trace or Trace()
        contents = [_contents(message) for message in messages]
        given = sum(map(count_passages, contents))
        left = None if self.most is None else max(0, self.most - given)
        done = []
        for message, content, asks in zip(messages, contents, _asking(messages), strict=True):
            parts: list[Part] = []
            last = max((i for i, p in enumerate(content) if isinstance(p, Text)), default=-1)
            for i, part in enumerate(content):
                if isinstance(part, Passage) or part.special or message["role"] == "assistant":
                    parts.append(part)
                    continue
                new = self._parts(part.text, asks and i == last, None, system, left, trace)
                left = None if left is None else left - count_passages(new)
                parts += new
            done.append({**message, "content": parts})
        return done

    def refresh(self) -> Table:
        """The table, up to date with the catalog."""
        with self._lock:
            if self._table.version != self._catalog.version():
                version, rows = self._catalog.changed_rows(self._table.version)
                texts = ((row, text) for row, _, _, text in self._catalog.texts(rows))
                self._table = self._table.changed(version, rows, texts)
            return self._table

    def _confirmed(
        self, prompt: str, found: Sequence[Stretch], table: Table
    ) -> list[tuple[Stretch, Document]]:
        """The stretches whose text is the catalog's, with their documents."""
        chosen: list[int] = []
        before = 0
        for stretch in found:
            chosen.append(self._choose(stretch, prompt[before : stretch.start], table))
            before = stretch.stop
        entries = {entry.row: entry for entry in self._entries(chosen)}
        confirmed = []
        for stretch, row in zip(found, chosen, strict=True):
            entry, text = entries.get(row), prompt[stretch.start : stretch.stop]
            if entry and entry.document.text.strip() == text:
                confirmed.append((stretch, entry.document))
        return confirmed

    def _choose(self, stretch: Stretch, before: str, table: Table) -> int:
        """Of several documents with one text: the one whose title stands before, else lowest id."""
        if len(stretch.rows) == 1:
            return stretch.rows[0]
        key = stretch.rows[0]
        if key not in table.titles:
            known = sorted(
                (id, title, row) for row, id, title, _ in self._catalog.texts(stretch.rows)
            )
            titles: dict[str, int] = {}
            for _, title, row in known:
                titles.setdefault(title.strip(), row)
            titles[""] = known[0][2] if known else stretch.rows[0]
            table.titles[key] = titles
        titles = table.titles[key]
        return titles[title_before(before, titles)]

    def _entries(self, rows: Sequence[int]) -> Sequence[KnownEntry]:
        try:
            return self._catalog.by_rows(rows)
        except CatalogError:
            pass
        entries: list[KnownEntry] = []
        for row in dict.fromkeys(rows):
            try:
                entries += self._catalog.by_rows([row])
            except CatalogError as error:
                logger.warning("a damaged document is computed as text: %s", error)
        return entries

    def _own(self, prompt: str, template: str) -> list[Closed]:
        """Where an application's prompt stands: its pieces between fields like "{context}".

        Pieces too short to hold a passage do not count.
        """
        pieces = (piece.strip() for piece in re.split(r"\{\w*\}", template))
        long = [piece for piece in pieces if len(piece.encode()) >= self.min_tokens]
        return [c for piece in long for c in occurrences(prompt, piece)]

    def _long_enough(self, prompt: str, matches: Sequence[Stretch]) -> list[Stretch]:
        """The matches with enough tokens; a text surely has them where it has as many words."""
        texts = {s.rows: prompt[s.start : s.stop] for s in matches}
        enough = {
            rows
            for rows, text in texts.items()
            if len(text.split(maxsplit=self.min_tokens)) >= self.min_tokens
            or len(self._tokenizer.encode(text)) >= self.min_tokens
        }
        return [s for s in matches if s.rows in enough]


# The table of known texts

_MULTIPLIER = np.uint64(secrets.randbits(64) | 1)
_LENGTH = np.uint64(LONGEST)
_HASH = np.uint64(~LONGEST & (1 << 64) - 1)
_SEED = secrets.randbits(64)
ENTRY = np.dtype([("digest", np.uint64), ("row", np.int64), ("neck", np.uint32)])


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Known texts, sorted by the hash of their first `HEAD` characters and then by length.

    heads: uint64 [n], 40 bits of hash and 24 of length. entries: `ENTRY` [n]. sizes: the head
    lengths that occur. titles: of documents with one text, filled as they are met. Apart from that
    never changed: another version is another table.
    """

    version: int = 0
    heads: Array = field(default_factory=lambda: np.empty(0, np.uint64))
    entries: Array = field(default_factory=lambda: np.empty(0, ENTRY))
    sizes: frozenset[int] = frozenset()
    titles: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.heads.nbytes + self.entries.nbytes

    def changed(self, version: int, rows: Sequence[int], texts: Iterable[tuple[int, str]]) -> Table:
        """This table without `rows`, and with `texts` (row, text)."""
        heads, entries = self.heads, self.entries
        gone = np.isin(entries["row"], np.array(rows, dtype=np.int64))
        if gone.any():
            heads, entries = heads[~gone], entries[~gone]
        new_heads, new_entries = _hashed(texts)
        at = np.searchsorted(heads, new_heads)
        heads = np.insert(heads, at, new_heads)
        sizes = np.bincount(np.minimum(heads & _LENGTH, HEAD).astype(np.int64)).nonzero()[0]
        entries = np.insert(entries, at, new_entries)
        return Table(version, heads, entries, frozenset(sizes.tolist()))

    def matches(self, prompt: str) -> list[Stretch]:
        """Every stretch of `prompt` that is a known text and does not begin or end in a word."""
        if not len(self.heads) or not prompt:
            return []
        codes = _codes(prompt)
        kind = np.full(len(codes) + 2, _SPACE, dtype=np.uint8)
        kind[1:-1] = _KINDS[np.minimum(codes, len(_KINDS) - 1)]
        border = (kind[:-1] != _WORD) | (kind[1:] != _WORD)
        starts = np.flatnonzero(border[:-1] & (kind[1:-1] != _SPACE))
        found: list[Stretch] = []
        patience = PATIENCE + 8 * len(prompt)
        for start, low in self._probe(codes, starts):
            near = self._near(low, prompt[start : start + NECK])
            stops = start + (self.heads[near] & _LENGTH).astype(np.int64)
            fit = border[np.minimum(stops, len(prompt))] & (stops <= len(prompt))
            near, stops = near[fit], stops[fit]
            patience -= LOOK + len(fit)
            for stop in np.unique(stops).tolist():
                patience -= stop - start
                if patience < 0:
                    logger.warning("the prompt looks like too many passages; the rest is computed")
                    return found
                same = self.entries[near[stops == stop]]
                rows = same["row"][same["digest"] == _digest(prompt[start:stop])].tolist()
                if rows:
                    free = (bool(kind[start] == _SPACE), bool(kind[stop + 1] == _SPACE))
                    found.append(Stretch(start, stop, tuple(sorted(rows)), free))
        return found

    def _probe(self, codes: Array, starts: Array) -> Iterator[tuple[int, int]]:
        """Positions where a known head stands, and the first place of that head in the table."""
        padded = np.concatenate([codes, np.zeros(HEAD, codes.dtype)])
        for first in range(0, len(starts), AT_ONCE):
            yield from sorted(self._probe_some(padded, starts[first : first + AT_ONCE]))

    def _probe_some(self, padded: Array, starts: Array) -> list[tuple[int, int]]:
        hashes = np.zeros(len(starts), dtype=np.uint64)
        found: list[tuple[int, int]] = []
        for size in range(1, HEAD + 1):
            hashes = hashes * _MULTIPLIER + padded[starts + (size - 1)]
            if size in self.sizes:
                keys = _key(hashes, size)
                low = np.searchsorted(self.heads, keys)
                hit = self.heads[np.minimum(low, len(self.heads) - 1)] & _HASH == keys
                found += zip(starts[hit].tolist(), low[hit].tolist(), strict=True)
        return found

    def _near(self, low: int, beginning: str) -> Array:
        """Places of the texts with the head at `low`; of many, those that go on as `beginning`."""
        high = int(np.searchsorted(self.heads, self.heads[low] | _LENGTH, side="right"))
        if high - low < CROWD:
            return np.arange(low, high)
        necks = self.entries["neck"][low:high]
        places: Array = low + np.flatnonzero((necks == 0) | (necks == _neck(beginning)))
        return places


def _hashed(texts: Iterable[tuple[int, str]]) -> tuple[Array, Array]:
    """Heads and entries of texts, sorted by head."""
    stripped = ((row, text.strip()) for row, text in texts)
    known = ((row, text) for row, text in stripped if 0 < len(text) <= LONGEST)
    heads, entries = [np.empty(0, np.uint64)], [np.empty(0, ENTRY)]
    while batch := list(islice(known, 1024)):
        heads.append(_heads([text for _, text in batch]))
        values = [(_digest(text), row, _neck(text)) for row, text in batch]
        entries.append(np.array(values, dtype=ENTRY))
    order = np.argsort(np.concatenate(heads), kind="stable")
    return np.concatenate(heads)[order], np.concatenate(entries)[order]


def _heads(texts: Sequence[str]) -> Array:
    """uint64 [texts]: hash of the first characters, and length."""
    joined = "".join(text[:HEAD].ljust(HEAD, "\0") for text in texts)
    codes = _codes(joined).reshape(len(texts), HEAD).astype(np.uint64)
    lengths = np.array([len(text) for text in texts], dtype=np.uint64)
    sizes = np.minimum(lengths, HEAD)
    hashes = np.zeros(len(texts), dtype=np.uint64)
    for i in range(HEAD):
        hashes = np.where(i < sizes, hashes * _MULTIPLIER + codes[:, i], hashes)
    return _key(hashes, sizes) | lengths


def _key(hashes: Array, size: Array | int) -> Array:
    mixed = (hashes * _MULTIPLIER + np.asarray(size, dtype=np.uint64)) * _MULTIPLIER
    key: Array = mixed & _HASH
    return key


def _digest(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), _SEED))


def _neck(text: str) -> int:
    """Hash of the first `NECK` characters, 32 bits; 0 where there are fewer."""
    return 0 if len(text) < NECK else _digest(text[:NECK]) & 0xFFFFFFFF or 1


def _codes(text: str) -> Array:
    """Code points, uint32 [characters]."""
    codes: Array = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return codes


def _kind(character: str) -> int:
    return _SPACE if character.isspace() else _WORD if character.isalnum() else _OTHER


_SPACE, _WORD, _OTHER = range(3)
_KINDS = np.array([_kind(chr(code)) for code in range(1 << 16)], dtype=np.uint8)


# Which matches become passages


def select(matches: Sequence[Stretch], closed: Sequence[Closed] = ()) -> list[Stretch]:
    """Stretches in order, none overlapping: of those that may be passages, the longest first.

    One must be free on both sides, or have another one there, no more than a separator away.
    """
    able = _open(matches, closed)
    for _ in range(SELECTIONS):
        taken = _longest_first(able)
        glued = _glued(taken)
        if not glued:
            break
        able = [s for s in able if s not in glued]  # what they hid may be one
    return [s for s in taken if s not in glued]


def _open(matches: Sequence[Stretch], closed: Sequence[Closed]) -> list[Stretch]:
    """The matches that nothing closed forbids."""
    if not closed:
        return list(matches)
    closed = sorted(closed, key=lambda c: c.start)
    starts, longest = [c.start for c in closed], max(c.stop - c.start for c in closed)

    def is_open(s: Stretch) -> bool:
        low, high = bisect.bisect(starts, s.start - longest), bisect.bisect(starts, s.stop)
        return not any(c.forbids(s.start, s.stop) for c in closed[low:high])

    return [s for s in matches if is_open(s)]


def _longest_first(found: Sequence[Stretch]) -> list[Stretch]:
    starts: list[int] = []
    taken: list[Stretch] = []
    for stretch in sorted(found, key=lambda s: (-len(s), s.start)):
        at = bisect.bisect(starts, stretch.start)
        before = at == 0 or taken[at - 1].stop <= stretch.start
        if before and (at == len(taken) or stretch.stop <= taken[at].start):
            starts.insert(at, stretch.start)
            taken.insert(at, stretch)
    return taken


def _glued(taken: Sequence[Stretch]) -> set[Stretch]:
    """Those that have neither white space nor another that stays at one of their sides."""
    gone: set[Stretch] = set()

    def near(left: int, right: int) -> bool:
        if left < 0 or right == len(taken) or gone & {taken[left], taken[right]}:
            return False
        return taken[right].start - taken[left].stop <= SEPARATOR

    waiting = list(range(len(taken)))
    while waiting:
        at = waiting.pop()
        left, right = taken[at].free
        stays = (left or near(at - 1, at)) and (right or near(at, at + 1))
        if not stays and taken[at] not in gone:
            gone.add(taken[at])
            waiting += [i for i in (at - 1, at + 1) if 0 <= i < len(taken)]
    return gone


# What may not be recognised

_QUESTION = re.compile(
    r"^[^\w\n]*(?:(?:the|this|my|our|user|user's|human|input|final|last|new|current|original|initial"
    r"|following|follow[- ]up|standalone)[ \t]{1,3})*(?:question|query|q|human|user|input)\b"
    r"(?:[ \t](?:is|was)(?:[ \t]as[ \t]follows)?)?[ \t]{0,3}\d{0,3}[*_]{0,3}[ \t]{0,3}:",
    re.IGNORECASE | re.MULTILINE,
)
_END_OF_QUESTION = re.compile(
    r"\n[^\S\n]*\n|\n[^\w\n]*[A-Za-z][\w' -]{0,30}:|\n[^\w\s]{3,}[^\S\n]*\n"
)
_NOT_SPACE = re.compile(r"\S")
_BARE_LABEL = re.compile(r"[^\w\n]*(?:[\w'-]+[ \t]+){0,4}[\w'-]+[*_ \t]*:[*_]*")


def occurrences(prompt: str, text: str) -> list[Closed]:
    """Where `text`, stripped, stands in `prompt`."""
    text, found, at = text.strip(), [], 0
    while text and (at := prompt.find(text, at)) >= 0:
        found.append(Closed(at, at + len(text), soft=True))
        at += len(text)
    return found


def find_question(prompt: str, passages: Sequence[Stretch]) -> Closed:
    """The final question of a prompt in which `passages` were found.

    What the last label such as "Question:" outside passages introduces, up to a blank line, a line
    of signs or the next label; without one, the last line that is not a bare label ("Answer:").
    """
    starts = [s.start for s in passages]
    for label in reversed(list(_QUESTION.finditer(prompt))):
        before = bisect.bisect(starts, label.end() - 1)
        if not before or passages[before - 1].stop < label.end():
            start = _NOT_SPACE.search(prompt, label.end())
            end = _END_OF_QUESTION.search(prompt, start.start()) if start else None
            return Closed(label.start(), end.start() if end else len(prompt))
    stop = len(prompt.rstrip())
    for _ in range(BARE_LABELS):
        start_of_line = prompt.rfind("\n", 0, stop) + 1
        line = prompt[start_of_line:stop].strip()
        if not start_of_line or len(line) > LABEL or not _BARE_LABEL.fullmatch(line):
            break
        stop = len(prompt[:start_of_line].rstrip())
    return Closed(prompt.rfind("\n", 0, stop) + 1, len(prompt))


def title_before(before: str, titles: Mapping[str, int]) -> str:
    """The title that stands nearest before a text, at the end of a line of its header; or ""."""
    block = re.split(r"\n[^\S\n]*\n", before[-2000:].rstrip())[-1]
    for line in reversed(block.splitlines()):
        line = line[-TITLE:]
        for end in (line.rstrip(), line.rstrip(" \t\r:.,;-–—#*_|)]}>\"'")):
            for word in re.finditer(r"(?<!\w)\S", end):
                if end[word.start() :] in titles:
                    return end[word.start() :]
    return ""


def _asking(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each message holds a question: the user's, with an answer or nothing after it."""
    roles = [message["role"] for message in messages]
    after = [*roles[1:], "assistant"] if roles else []
    return [pair == ("user", "assistant") for pair in zip(roles, after, strict=True)]


# Parts


def _cut(prompt: str, found: Sequence[tuple[Stretch, Document]]) -> list[Part]:
    parts: list[Part] = []
    at = 0
    for stretch, document in found:
        if at < stretch.start:
            parts.append(Text(prompt[at : stretch.start]))
        parts.append(Passage(document))
        at = stretch.stop
    if at < len(prompt) or not parts:
        parts.append(Text(prompt[at:]))
    return parts


def _contents(message: Mapping[str, Any]) -> list[Part]:
    try:
        content, _ = message["content"], message["role"]
    except (KeyError, TypeError) as error:
        raise PromptError("found a message without role or content, expected both") from error
    return content_parts(content)


def count_passages(parts: Iterable[Part]) -> int:
    """How many of `parts` are passages."""
    return sum(isinstance(part, Passage) for part in parts)
