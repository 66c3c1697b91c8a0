"""The prompt formats that training draws from: how pages and a question become parts.

Most prompts use the spec's own preset. The rest vary the system prompt, put instructions around
the context as LangChain's and LlamaIndex's stock prompts do, join passages with blank lines,
hold the context in the system message, give it as plain text, run over two turns, or hold no
documents. Knows parts, not tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvlink_rag.datasets.answers import ABSENT
from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.prompt.spec import Spec

from .world import Page

BOS, SYSTEM, USER, ASSISTANT, END = "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
TURN = END + ASSISTANT
SYSTEMS = (
    "",
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer from the context.",
    "Answer the question with the documents.",
)
WRAPPERS = (
    ("Use the following context to answer the question.\n\n", "\n", "\n\nQuestion: {}\nAnswer:"),
    (
        "Use the following pieces of context to answer the question at the end. If you don't know "
        "the answer, just say that you don't know, don't try to make up an answer.\n\n",
        "\n\n",
        "\n\nQuestion: {}\nHelpful Answer:",
    ),
    (
        "Context information is below.\n---------------------\n",
        "\n\n",
        "\n---------------------\nGiven the context information and not prior knowledge, "
        "answer the query.\nQuery: {}\nAnswer: ",
    ),
    ("Answer the question based only on the following context:\n", "\n\n", "\n\nQuestion: {}\n"),
    ("Context:\n", "\n", "\nQuestion: {}"),
    ("", "\n\n", "\n\n{}"),
    ("", "\n", "{}"),
)
GREETINGS = (
    "Hello!",
    "Hello",
    "Hi",
    "Hi there!",
    "Good morning.",
    "Good evening!",
    "Hey",
    "Thank you!",
    "Thanks.",
)
REPLY = "Hello. Ask me about the documents."
THANKS = "You are welcome."


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts up to the last message's question; `tail` formats a question, `after` follows
    it.
    """

    head: tuple[Part, ...]
    tail: str
    after: str = TURN

    def ask(self, question: str) -> tuple[Part, ...]:
        return (*self.head, Text(self.tail.format(question)), Text(self.after, special=True))


def document(page: Page) -> Document:
    """The page as the engine knows it."""
    return Document(page.text, page.title, page.id)


def preset(pages: Sequence[Page], spec: Spec) -> Prompt:
    """The spec's own prompt."""
    before, after = spec.prompt_preset.before, spec.prompt_preset.after
    return Prompt((Text(before, special=True), *(Passage(document(p)) for p in pages)), "{}", after)


def varied(pages: Sequence[Page], rng: random.Random, *, reuse: bool, spec: Spec) -> Prompt:
    """Another system prompt, other instructions, other joins; `reuse=False` gives the pages as
    text.
    """
    system, (intro, join, tail) = rng.choice(SYSTEMS), rng.choice(WRAPPERS)
    context = _joined(pages, join, rng, reuse=reuse, spec=spec)
    if rng.random() < 0.25:
        head = [Text(BOS + SYSTEM, special=True), Text(intro or "Documents:\n"), *context]
        return Prompt((*head, Text(END + USER, special=True)), "{}")
    opening = BOS + (SYSTEM + system + END if system else "") + USER
    return Prompt((Text(opening, special=True), *_texts(intro), *context), tail)


def second_turn(first: Prompt, question: str, answer: str, pages: Sequence[Page]) -> Prompt:
    """A chat whose first exchange is done and whose second message brings pages of its own."""
    asked = (*first.ask(question), Text(answer), Text(END + USER, special=True))
    return Prompt((*asked, *(Passage(document(p)) for p in pages)), "{}")


def bare(rng: random.Random, spec: Spec) -> Prompt:
    """No documents at all."""
    system = rng.choice(SYSTEMS)
    other = BOS + (SYSTEM + system + END if system else "") + USER
    return Prompt((Text(rng.choice((spec.prompt_preset.before, other)), special=True),), "{}")


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting or thanks and the reply to it."""
    said = rng.choice(GREETINGS)
    return said, THANKS if said.startswith("Thank") else REPLY


def without_documents(text: str, rng: random.Random) -> tuple[str, str]:
    """What a prompt without documents asks and gets: small talk, or a question that nothing
    answers.
    """
    return small_talk(rng) if rng.random() < 0.3 else (text, ABSENT)


def _joined(
    pages: Sequence[Page], join: str, rng: random.Random, *, reuse: bool, spec: Spec
) -> list[Part]:
    titled = rng.random() < 0.6
    parts: list[Part] = []
    for index, page in enumerate(pages):
        if index and not (reuse and join == "\n"):
            parts.append(Text(join))
        if reuse:
            parts.append(Passage(document(page)))
        elif titled:
            parts.append(Text(spec.render_passage(document(page)).rstrip("\n")))
        else:
            parts.append(Text(page.text))
    return parts


def _texts(*texts: str) -> list[Part]:
    return [Text(text) for text in texts if text]
