"""Several questions over one growing prompt: what was retrieved and said stays in it.

    question → new passages → [system, (passages, question, answer) …, passages, question] → answer

Earlier turns do not change, so their keys and values are reused: slots of passages count on, and
computed runs are kept by the collection. Knows `KVLinkRAG`; knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvlink_rag.documents import Hit, Part, Passage, Text
from kvlink_rag.errors import PromptTooLong, TooManyPassages
from kvlink_rag.model.prompt_run import TextStream
from kvlink_rag.retrieval.rounds import in_order
from kvlink_rag.trace import Trace

from .rag import KVLinkRAG

SYSTEM = "You answer questions from the documents."


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
        self.order = rag.order(order)
        self._system = {"role": "system", "content": SYSTEM if system is None else system}
        self._turns: list[Turn] = []
        self._numbered = 0

    def ask(self, question: str, **options: Any) -> Turn:
        """Begin the answer to `question`. Options as in `KVLinkModel.stream`."""
        return Turn(self, question, options)

    def hits(self, question: str) -> list[Hit]:
        """New passages for `question`: asked alone, and after the last question."""
        found = self._rag.search(question, self._k, rounds=self._rounds)
        if self._turns:
            both = f"{self._turns[-1].question} {question}"
            found = _interleaved(found, self._rag.search(both, self._k, rounds=self._rounds))
        shown = {hit.document.id for turn in self._turns for hit in turn.hits}
        return [hit for hit in found if hit.document.id not in shown][: self._k]

    def start(self, turn: Turn, options: dict[str, Any]) -> TextStream:
        """The stream of `turn`'s answer; forgets the oldest turns until the prompt fits."""
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
        return self._rag.model.stream(parts, reuse=self._rag.reuse, trace=turn.trace, **options)

    def finish(self, turn: Turn) -> None:
        """Keep `turn` for those after it."""
        self._turns.append(turn)
        self._numbered += len(turn.hits)

    def _messages(self, turn: Turn) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [self._system] if self._system["content"] else []
        for past in self._turns:
            messages += [past.message(), {"role": "assistant", "content": past.text}]
        return [*messages, turn.message()]


class Turn(Iterator[str]):
    """One question and its answer as it comes. `hits` are there after the first `next()`."""

    def __init__(self, conversation: Conversation, question: str, options: dict[str, Any]) -> None:
        self.question = question
        self.hits: list[Hit] = []
        self.trace = Trace()
        self.text = ""
        self.first_number = 1
        self._conversation, self._options = conversation, options
        self._pieces = self._run()

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def message(self) -> dict[str, Any]:
        """The user's message: the passages, then the question."""
        laid = in_order(self.hits, self._conversation.order)
        passages: list[Part] = [Passage(hit.document) for hit in laid]
        return {"role": "user", "content": [*passages, Text(self.question)]}

    def _run(self) -> Iterator[str]:
        self.trace.restart()
        with self.trace.stage("retrieval"):
            self.hits = self._conversation.hits(self.question)
        yield from self._conversation.start(self, self._options)
        self._conversation.finish(self)


def _interleaved(first: list[Hit], second: list[Hit]) -> list[Hit]:
    """Both lists by turns, no document twice."""
    longest = max(len(first), len(second))
    pairs = [hit for i in range(longest) for hit in (*first[i : i + 1], *second[i : i + 1])]
    found: dict[str | None, Hit] = {}
    for hit in pairs:
        found.setdefault(hit.document.id, hit)
    return list(found.values())
