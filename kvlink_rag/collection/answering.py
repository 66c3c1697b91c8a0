"""The life of a question.

    question → hits → parts                                    (`from_question`, `recognising`)
    parts → layout → snapshots → live cache → first token → text        (`model.text_stream`)

One stream serves `ask`, `complete` and a conversation; they differ only in how parts are found.
Knows the parts of a collection; knows no framework and no terminal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvlink_rag.arguments import parse_repair
from kvlink_rag.documents import Hit, Part
from kvlink_rag.retrieval.rounds import in_order
from kvlink_rag.trace import Trace

from .parts import Parts
from .searching import search_distinct

if TYPE_CHECKING:
    from kvlink_rag.model.text_stream import TextStream
    from kvlink_rag.prompt.format import PromptFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, the hits it was read from (best first) and what it cost."""

    text: str
    hits: list[Hit]
    trace: Trace


@dataclass(frozen=True, slots=True)
class Found:
    """What an answer is read from: the parts of its prompt, and the hits they hold, best first."""

    parts: Iterable[Part]
    hits: list[Hit] = field(default_factory=list)


Find = Callable[[Trace], Found]


class AnswerStream(Iterator[str]):
    """An answer as it comes.

    Nothing runs before the first `next()`. `hits` are there after it, `trace` is final at the end.
    find: finds the parts of the prompt. arguments: as in `KVLinkModel.stream`.
    """

    def __init__(self, parts: Parts, find: Find, arguments: Mapping[str, Any]) -> None:
        if arguments.get("repair") is not None:
            parse_repair(arguments["repair"])  # a wrong one is told at once
        self.hits: list[Hit] = []
        self.trace = Trace()
        self._parts, self._find, self._arguments = parts, find, arguments
        self._stream: TextStream | None = None
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self._stream.text if self._stream else ""

    @property
    def answer(self) -> Answer:
        """What has been said so far, as an `Answer`."""
        return Answer(self.text, self.hits, self.trace)

    def _run(self) -> Generator[str, None, None]:
        loaded = self._parts.loaded()
        self.trace.restart()
        # 1. question → hits → parts
        found = self._find(self.trace)
        self.hits = found.hits
        # 2. parts → layout → snapshots → live cache → first token → text
        self._stream = loaded.model.stream(
            found.parts, reuse=loaded.reuse, trace=self.trace, **self._arguments
        )
        if self.trace.mode == "reuse" and not self._stream.repair:
            self._warn_untuned(loaded.model.format)
        yield from self._stream

    def _warn_untuned(self, format: PromptFormat) -> None:
        """Tell once that the model was never tuned to what it is about to do."""
        if not format.tuned and self._parts.seen.first("untuned"):
            logger.warning(
                "%s was not tuned to read passages that were encoded apart, so answers may be far "
                "from those of full attention; measure it (kvlink-rag verify --quality QUESTIONS), "
                "repair passages at question time (repair='first:16', kvlink-rag ask --repair "
                "first:16), or tune it (kvlink-rag train)",
                format.name,
            )


def from_question(parts: Parts, question: str, *, k: int, rounds: int, order: str) -> Find:
    """Finds what retrieval finds: the spec's prompt over the best `k` texts."""

    def find(trace: Trace) -> Found:
        # 1. question → hits
        with trace.stage("retrieval"):
            hits = search_distinct(parts, question, k, rounds=rounds)
        # 2. hits → parts
        documents = [hit.document for hit in in_order(hits, order)]
        return Found(parts.loaded().model.prompt(documents, question), hits)

    return find
