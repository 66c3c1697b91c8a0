"""Several questions over one growing prompt: what was retrieved and said stays in it.

    question → new passages → [system, (passages, question, answer) …, passages, question] → answer

Earlier turns do not change, so their keys and values are reused: slots of passages count on, and
computed runs are kept by the collection. Knows `KVLinkRAG`; knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from kvlink_rag.documents import Hit, Part, Passage, Text
from kvlink_rag.errors import PromptTooLong, TooManyPassages
from kvlink_rag.prompt.format import INSTRUCTION
from kvlink_rag.retrieval.rounds import in_order
from kvlink_rag.trace import Trace

from .answering import AnswerStream, Found
from .parts import Parts
from .rag import KVLinkRAG
from .searching import search_distinct


class Conversation:
    """A chat over the passages of a collection.

    k: passages retrieved for each question; those already in the conversation are not repeated.
    order: of a question's passages in the prompt, see `KVLinkRAG.stream`.
    When slots or window are used up, the oldest turns are forgotten, with their passages.
    """

    def __init__(
        self,
        rag: KVLinkRAG,
        k: int = 4,
        rounds: int = 1,
        *,
        system: str | None = None,
        order: str | None = None,
    ) -> None:
        self._rag, self._k, self._rounds = rag, k, rounds
        self.parts = rag.parts
        self.order = rag.order(order)
        self._system = {"role": "system", "content": INSTRUCTION if system is None else system}
        self._turns: list[Turn] = []
        self._numbered = 0

    def ask(self, question: str, **options: Any) -> Turn:
        """Begin the answer to `question`. Options as in `KVLinkModel.stream`."""
        return Turn(self, question, options)

    def hits(self, question: str) -> list[Hit]:
        """New passages for `question`: asked alone, and after the last question."""
        before = [turn.question for turn in self._turns[-1:]]
        found = hits_for(self.parts, question, before, k=self._k, rounds=self._rounds)
        shown = {hit.document.text.strip() for turn in self._turns for hit in turn.hits}
        return [hit for hit in found if hit.document.text.strip() not in shown][: self._k]

    def find(self, turn: Turn, trace: Trace) -> Found:
        """The prompt of `turn`; forgets the oldest turns until it fits."""
        # 1. question → hits
        with trace.stage("retrieval"):
            turn.hits = self.hits(turn.question)
        # 2. hits and what was said → parts
        while True:
            parts = self._rag.model.chat(self._messages(turn))
            try:
                self._rag.model.layout(parts)
                break
            except (TooManyPassages, PromptTooLong):
                if not self._turns:
                    raise
                del self._turns[0]
        turn.first_number = self._numbered + 1
        return Found(parts, turn.hits)

    def finish(self, turn: Turn) -> None:
        """Keep `turn` for those after it."""
        self._turns.append(turn)
        self._numbered += len(turn.hits)

    def _messages(self, turn: Turn) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [self._system] if self._system["content"] else []
        for past in self._turns:
            messages += [past.message(), {"role": "assistant", "content": past.text}]
        return [*messages, turn.message()]


class Turn(AnswerStream):
    """One question and its answer as it comes; first_number: of its hits in the conversation."""

    def __init__(self, conversation: Conversation, question: str, options: dict[str, Any]) -> None:
        super().__init__(conversation.parts, lambda trace: conversation.find(self, trace), options)
        self.question, self.first_number = question, 1
        self._conversation = conversation

    def message(self) -> dict[str, Any]:
        """The user's message: the passages, then the question."""
        laid = in_order(self.hits, self._conversation.order)
        passages: list[Part] = [Passage(hit.document) for hit in laid]
        return {"role": "user", "content": [*passages, Text(self.question)]}

    def _run(self) -> Generator[str, None, None]:
        yield from super()._run()
        self._conversation.finish(self)


def hits_for(
    parts: Parts, question: str, before: Sequence[str], *, k: int, rounds: int = 1
) -> list[Hit]:
    """Hits for `question` asked alone, and after the questions `before` it, by turns.

    At most `k` of each, no text twice.
    """
    found = search_distinct(parts, question, k, rounds=rounds)
    for earlier in before:
        again = search_distinct(parts, f"{earlier} {question}", k, rounds=rounds)
        found = _interleaved(found, again)
    return found


def _interleaved(first: list[Hit], second: list[Hit]) -> list[Hit]:
    """Both lists by turns, no text twice."""
    longest = max(len(first), len(second))
    pairs = [hit for i in range(longest) for hit in (*first[i : i + 1], *second[i : i + 1])]
    found: dict[str, Hit] = {}
    for hit in pairs:
        found.setdefault(hit.document.text.strip(), hit)
    return list(found.values())
