"""Rows of training sets to samples: one documented transform for each, most of them the paper's.

    qa            multi-document QA, passages as memory; only the answer is learned
    qa_full       its twin: the same documents as computed text (ordinary attention)
    gaps          the passages of a QA row, and words taken out of them to be found again
    text_memory   plain text, its beginning cut into memory passages; the rest is learned
    text          plain text, all of it learned
    chat_memory   a conversation, earlier exchanges as memory; the last answer is learned
    chat          a conversation without memory; every answer is learned
    summary       an article cut into memory passages; its summary is learned

Where the authors cut by tokens, these cut between words, about 0.75 of them a token, so that a
passage is text and its template is inference's. Knows rows and parts; no model and no file.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvlink_rag.datasets.rows import Row
from kvlink_rag.datasets.schemas import SUMMARIZE
from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import ExampleError
from kvlink_rag.prompt.spec import Spec

from .chat import Chat
from .gaps import gaps_together
from .questions import Asking, asked_together
from .samples import Sample, Tail

WORDS_A_TOKEN = 0.75
MEMORY_TOKENS = (500, 1500)  # of a plain text that become memory
MEMORY_PASSAGES = (5, 40)
ARTICLE_TOKENS = (1000, 3000)  # XSum articles outside are skipped, as the authors do
SHORT_PIECE, LONG_PIECE, LONG_ARTICLE = 100, 220, 1900


@dataclass(frozen=True, slots=True)
class Format:
    """What a transform writes with: the model's spec and chat, and the set's own settings.

    asking: how questions get their passages. column: of the text, or the answer, if not the
    schema's own. opening: the special token that begins a text, if any.
    """

    spec: Spec
    chat: Chat
    instruction: str
    asking: Asking = field(default_factory=Asking)
    column: str | None = None
    opening: str = ""

    def ask(
        self, documents: Sequence[Document], asked: Sequence[tuple[str, str]]
    ) -> tuple[tuple[Part, ...], tuple[Tail, ...]]:
        """The prompt of inference up to its last passage, and what follows for each question."""
        parts = self.spec.prompt(documents, "")
        at = max((i for i, part in enumerate(parts) if isinstance(part, Passage)), default=-1) + 1
        tails = []
        for question, answer in asked:
            after = self.spec.prompt(documents, question)[at:]
            written = [(part, False) for part in after if isinstance(part, Text)]
            tails.append((*written, *self.answer(answer)))
        return tuple(parts[:at]), tuple(tails)

    def answer(self, text: str) -> Tail:
        """A learned answer and its end."""
        return (Text(text), True), (Text(self.chat.end, special=True), True)


class Unwanted(ExampleError):
    """A row that the recipe leaves out on purpose: never an error, whatever `on_bad` says."""


Transform = Callable[[Row, int, Format, random.Random], Sample]


def qa(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """Rows of `question_answering`, with the questions that others ask about the same passages.

    The answer is the column `generated` (the authors' answers are GPT-4's) or another that the
    config names, else the first of the set's own.
    """
    documents, asked = asked_together(row, number, form.asking, form.column, rng)
    return Sample(*form.ask(documents, asked))


def qa_full(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """As `qa`, each passage as the text that inference would encode for it."""
    documents, asked = asked_together(row, number, form.asking, form.column, rng)
    head, tails = form.ask(documents, asked)
    places = iter(range(len(documents)))
    texts = tuple(
        Text(form.spec.render_passage(part.document, next(places)))
        if isinstance(part, Passage)
        else part
        for part in head
    )
    return Sample(texts, tails)


def gaps(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """Rows of `question_answering`: their passages, and gaps in them in place of their questions.

    This is not of the paper's recipe.
    """
    documents, asked = gaps_together(row, number, form.asking, form.column, rng)
    return Sample(*form.ask(documents, asked))


def text(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """`text` (FineWeb) behind the token that begins a text."""
    learned = Text(_string(row, form.column or "text"))
    return Sample(_begin(form), (((learned, True),),), cut=True)


def text_memory(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """`text` (FineWeb): its first 500 to 1,500 tokens in 5 to 40 passages, the rest learned."""
    whole = _string(row, form.column or "text")
    starts = [found.start() for found in re.finditer(r"\S+", whole)]
    words = int(rng.randint(*MEMORY_TOKENS) * WORDS_A_TOKEN)
    if len(starts) <= words:
        raise Unwanted(f"the text has {len(starts)} words, expected more than {words}")
    most = min(MEMORY_PASSAGES[1], form.spec.max_passages or MEMORY_PASSAGES[1])
    count = rng.randint(min(MEMORY_PASSAGES[0], most), most)
    breaks = [0, *sorted(rng.sample(range(1, words), count - 1)), words]
    cuts = [starts[at] for at in breaks]
    pieces = [whole[a:b].strip() for a, b in pairwise(cuts)]
    head = (*_begin(form), *(Passage(Document(piece)) for piece in pieces))
    return Sample(head, (((Text(whole[cuts[-1] :]), True),),), cut=True)


def chat(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """`messages` of role and content (TÜLU 3), or `conversations` of from and value."""
    system, turns = _conversation(row)
    frame = form.chat
    tail: list[tuple[Text, bool]] = []
    for place, (asked, said) in enumerate(turns):
        if place:
            tail.append((Text(frame.again.removeprefix(frame.end), special=True), False))
        tail += [(Text(asked), False), (Text(frame.assistant, special=True), False)]
        tail += form.answer(said)
    return Sample(_opening(form, system), (tuple(tail),))


def chat_memory(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """`conversations` of from and value (Daring-Anteater) of two exchanges or more.

    An exchange becomes a passage of plain text: passages hold no special tokens.
    """
    system, turns = _conversation(row)
    if len(turns) < 2:
        raise Unwanted(f"the conversation has {len(turns)} exchanges, expected two or more")
    *earlier, (asked, said) = turns
    passages = [Passage(Document(f"User: {a}\nAssistant: {b}")) for a, b in earlier]
    tail = ((Text(asked), False), (Text(form.chat.assistant, special=True), False))
    return Sample((*_opening(form, system), *passages), ((*tail, *form.answer(said)),))


def summary(row: Row, number: int, form: Format, rng: random.Random) -> Sample:
    """`document` and `summary` (XSum): passages of about 100 tokens, 220 for long articles."""
    article, wanted = _string(row, "document"), _string(row, "summary")
    words = [found.start() for found in re.finditer(r"\S+", article)]
    tokens = len(words) / WORDS_A_TOKEN
    if not ARTICLE_TOKENS[0] <= tokens < ARTICLE_TOKENS[1]:
        raise Unwanted(f"the article has about {tokens:.0f} tokens, expected 1000 to 3000")
    size = int((LONG_PIECE if tokens > LONG_ARTICLE else SHORT_PIECE) * WORDS_A_TOKEN)
    cuts = [*words[::size], len(article)]
    pieces = [article[a:b].strip() for a, b in pairwise(cuts)]
    documents = [Document(piece) for piece in pieces]
    return Sample(*form.ask(documents, [(SUMMARIZE, wanted)]))


TRANSFORMS: Mapping[str, Transform] = {
    "qa": qa,
    "qa_full": qa_full,
    "gaps": gaps,
    "text": text,
    "text_memory": text_memory,
    "chat": chat,
    "chat_memory": chat_memory,
    "summary": summary,
}


def _begin(form: Format) -> tuple[Part, ...]:
    """What begins a text, where the tokenizer has such a token."""
    return (Text(form.opening, special=True),) if form.opening else ()


def _opening(form: Format, system: str | None) -> tuple[Part, ...]:
    """Up to the first user text. What a row says as system is text, whatever it holds."""
    if system is None:
        return (form.chat.opening(form.instruction),)
    frame = form.chat
    return Text(frame.system, special=True), Text(system), Text(frame.user, special=True)


def _conversation(row: Row) -> tuple[str | None, list[tuple[str, str]]]:
    """The system text, if any, and the exchanges; a last question without an answer is dropped."""
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, Sequence) or not messages:
        raise ExampleError(
            f"no usable column 'messages' or 'conversations'; found {', '.join(sorted(row))}"
        )
    said = [_message(message) for message in messages]
    system = said.pop(0)[1] if said[0][0] == "system" else None
    if [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2) + ["user"] * (
        len(said) % 2
    ):
        raise ExampleError("the messages are not user and assistant in turn")
    texts = [content for _, content in said]
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    if not turns or not all(answer.strip() for _, answer in turns):
        raise ExampleError("the conversation has no answer, or an empty one")
    return system, turns


_ROLES = {"human": "user", "gpt": "assistant"}


def _message(message: Any) -> tuple[str, str]:
    try:
        role, content = (
            (message["role"], message["content"])
            if "role" in message
            else (message["from"], message["value"])
        )
        role = role.lower()
    except (LookupError, TypeError, AttributeError) as error:
        raise ExampleError(f"a message is not role and content ({error!r})") from error
    if not isinstance(content, str):
        raise ExampleError(f"a message's content is {type(content).__name__}, expected str")
    return _ROLES.get(role, role), content


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ExampleError(f"no usable column {column!r}; found {', '.join(sorted(row))}")
    return value
