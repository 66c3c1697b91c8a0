"""Passages found by their content in a prompt that someone else wrote.

A stretch of the prompt that is verbatim the text of a known passage becomes that `Passage`; all
else stays `Text`. There are no markers that a document could forge. Rules and limits stand in
`docs/architecture.md`. Knows texts, rows and versions; knows neither SQLite nor FAISS, no model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import CatalogError, PromptError
from kvlink_rag.prompt.chat import content_parts
from kvlink_rag.prompt.layout import PartEncoder
from kvlink_rag.trace import Trace

from .beginnings import HEAD, Table
from .escapes import unescaped
from .rules import asking, find_question, occurrences, title_before
from .stretches import Closed, Stretch, select

MIN_TOKENS = 16

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


class Recogniser:
    """Finds the passages of one collection in prompts. Safe to share between threads.

    min_tokens: shorter stretches stay text. most: passages at most, as a model has slots; those
    after them stay text.
    The table of known texts is made at the first call and follows the catalog's changes, whichever
    process made them: 36 bytes a passage.
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
        self._lock = ForkSafeLock()

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
        matches = self._long_enough(prompt, _matches(prompt, table))
        found = select(matches, closed)
        asked = closed[-1] if question is not None and closed else None
        if asks and question is None:
            asked = find_question(prompt, found)
            if inside := [s for s in found if asked.forbids(s.start, s.stop)]:
                start = min(asked.start, *(s.start for s in inside))
                found = select(matches, [*closed, Closed(start, asked.stop)])
        confirmed = self._confirmed(prompt, found, table)
        known = [(stretch.start, stretch.stop) for stretch, _ in confirmed]
        known += [(asked.start, asked.stop)] if asked else []
        trace.unrecognised_tokens += self._unrecognised(prompt, sorted(known), table)
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
        for message, content, asks in zip(messages, contents, asking(messages), strict=True):
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
            if entry and entry.document.text.strip() in (text, unescaped(text).text):
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

    def _unrecognised(self, prompt: str, known: Sequence[tuple[int, int]], table: Table) -> int:
        """Tokens that begin like a known text, outside passages and the question (`known`)."""
        at, tokens = 0, 0
        for start, stop in (*known, (len(prompt), len(prompt))):
            outside = prompt[at:start]
            if len(outside) >= HEAD:
                alike = (self._tokenizer.encode(outside[a:b]) for a, b in table.begun(outside))
                tokens += sum(len(ids) for ids in alike if len(ids) >= self.min_tokens)
            at = max(at, stop)
        return tokens

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


def _matches(prompt: str, table: Table) -> list[Stretch]:
    """Every stretch that is a known text, as it is or as JSON and Python write it in a string."""
    found = table.matches(prompt)
    if "\\" not in prompt:
        return found
    plain = unescaped(prompt)
    for match in table.matches(plain.text):
        start, stop = plain.places[match.start], plain.places[match.stop]
        if "\\" in prompt[start:stop]:
            found.append(replace(match, start=start, stop=stop))
    return found


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
