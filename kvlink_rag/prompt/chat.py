"""Conversations through a tokenizer's chat template. Knows templates; knows no model.

A template is rendered twice: with a mark in place of each content, which shows the template's own
stretches (they hold special tokens, contents never do) and the order it puts contents in; and with
the contents, passages as marks, which shows what it makes of them (most trim, some drop the
thinking of earlier answers). The rendered prompt is the template's own to the letter.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlink_rag.documents import Part, Passage, Text
from kvlink_rag.errors import PromptError

GAP = "\n\n"  # between texts that are folded into one message
THOUGHT = "</think>"  # ends what a reasoning model thought before its answer


@dataclass(frozen=True, slots=True)
class Message:
    """A checked message of a conversation."""

    role: str
    content: tuple[Part, ...]


def has_template(tokenizer: Any) -> bool:
    """Whether the Hugging Face `tokenizer` renders conversations itself."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_pieces(tokenizer: Any, roles: Sequence[str]) -> list[str]:
    """The special text before the content of each message, and what opens the answer after them.

    Raises `PromptError` where the template drops, repeats or reorders a content.
    """
    pieces, order = _pieces(tokenizer, roles)
    if order != list(range(len(roles))):
        raise PromptError(_lost("drops, repeats or reorders a message"))
    return pieces


def render(tokenizer: Any, roles: Sequence[str], contents: Sequence[Sequence[Part]]) -> list[Part]:
    """The conversation as the template writes it: its stretches as special text, and the contents.

    Where the template has no place for a system text, it is folded into the next user message, and
    where turns must alternate, messages of one role in a row become one. Raises `PromptError` where
    the template refuses all of that, or loses a message.
    """
    given = [Message(role, tuple(content)) for role, content in zip(roles, contents, strict=True)]
    refusal: PromptError | None = None
    for messages in _ways(given):
        try:
            return _rendered(tokenizer, messages)
        except PromptError as error:
            refusal = refusal or error
    raise refusal or PromptError("found no message, expected at least one")


def _ways(given: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are, then as templates that are more particular may take them."""
    ways = [given, _folded(given), _merged(given), _merged(_folded(given))]
    yield from (way for n, way in enumerate(ways) if way and way not in ways[:n])


def _folded(messages: Sequence[Message]) -> list[Message]:
    """Each system text at the beginning of the user message after it; none without such a one."""
    folded: list[Message] = []
    waiting: list[Part] = []
    for message in messages:
        if message.role == "system":
            waiting += [*message.content, Text(GAP)]
        elif message.role == "user" and waiting:
            folded.append(Message("user", (*waiting, *message.content)))
            waiting = []
        else:
            folded.append(message)
    return [] if waiting else folded


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role in a row as one."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            both = (*merged.pop().content, Text(GAP), *message.content)
            message = Message(message.role, both)
        merged.append(message)
    return merged


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> list[Part]:
    pieces, order = _pieces(tokenizer, [message.role for message in messages])
    if lost := set(range(len(messages))) - set(order):
        raise PromptError(_lost(f"drops the {messages[min(lost)].role} message"))
    marked = [_Marked.of(message.content) for message in messages]
    said = [(m.role, c.text) for m, c in zip(messages, marked, strict=True)]
    found = _matched(_apply(tokenizer, said), pieces, [marked[i].forms() for i in order])
    if found is None:
        raise PromptError(_lost("changes the text of a message in a way that cannot be followed"))
    parts: list[Part] = []
    for piece, index, form in zip(pieces, order, found, strict=False):
        parts += [Text(piece, special=True), *marked[index].parts(form)]
    return [*parts, Text(pieces[-1], special=True)]


def _pieces(tokenizer: Any, roles: Sequence[str]) -> tuple[list[str], list[int]]:
    """The template's own stretches, and which message's content stands after each but the last."""
    mark = uuid.uuid4().int
    marks = [f"\ue000{mark}-{number}\ue001" for number in range(len(roles))]
    rendered = _apply(tokenizer, list(zip(roles, marks, strict=True)))
    split = re.split(f"\ue000{mark}-(\\d+)\ue001", rendered)
    return split[::2], [int(number) for number in split[1::2]]


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> str:
    """The template's text, or its refusal as a `PromptError`."""
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it raises whatever it likes
        roles = ", ".join(role for role, _ in messages) or "none"
        raise PromptError(
            f"the model's chat template refuses messages of the roles {roles} "
            f"({str(error) or type(error).__name__}); give user and assistant messages in turn, "
            "the user's first and last, with at most one system message before them"
        ) from error


def _lost(what: str) -> str:
    return (
        f"the chat template {what}; give messages in an order that it accepts, usually system, "
        "then user and assistant in turn"
    )


@dataclass(frozen=True, slots=True)
class _Marked:
    """A content as a template sees it: passages and special texts as marks, which none changes."""

    text: str
    held: Mapping[str, Part]

    @classmethod
    def of(cls, content: Sequence[Part]) -> _Marked:
        held: dict[str, Part] = {}
        text = ""
        for part in content:
            if isinstance(part, Text) and not part.special:
                text += part.text
                continue
            mark = f"\ue000{uuid.uuid4().int}\ue001"
            held[mark], text = part, text + mark
        return cls(text, held)

    def forms(self) -> list[str]:
        """What templates make of it: as it is, trimmed, without what was thought before it."""
        answers = [self.text]
        if THOUGHT in self.text:
            answers += [self.text.split(THOUGHT)[-1], self.text.split(THOUGHT, 1)[-1]]
        trimmed = (
            form
            for text in answers
            for form in (
                *(text, text.strip(), text.lstrip(), text.rstrip()),
                *(text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")),
            )
        )
        return list(dict.fromkeys(trimmed))

    def parts(self, form: str) -> list[Part]:
        """`form` with its passages and special texts in place of their marks."""
        if not self.held:
            return [Text(form)] if form else []
        pattern = "(" + "|".join(map(re.escape, self.held)) + ")"
        pieces = (piece for piece in re.split(pattern, form) if piece)
        return [self.held.get(piece) or Text(piece) for piece in pieces]


def _matched(
    rendered: str, pieces: Sequence[str], forms: Sequence[Sequence[str]]
) -> list[str] | None:
    """For each content the form in which it stands between the pieces, or None where none fits."""
    failed: set[tuple[int, int]] = set()

    def match(index: int, at: int) -> list[str] | None:
        if not rendered.startswith(pieces[index], at) or (index, at) in failed:
            return None
        at_content = at + len(pieces[index])
        if index == len(forms):
            return [] if at_content == len(rendered) else None
        for form in forms[index]:
            if rendered.startswith(form, at_content):
                rest = match(index + 1, at_content + len(form))
                if rest is not None:
                    return [form, *rest]
        failed.add((index, at))
        return None

    return match(0, 0)


def checked_role(role: object) -> str:
    """A role stands in the template's own text, so it must not hold a special token."""
    if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", role):
        raise PromptError(f"a message's role is {role!r}, expected a word such as user")
    return role


def content_parts(content: object) -> list[Part]:
    """A message's content as parts. Raises `PromptError` for anything but text and parts.

    A list may hold `Text` and `Passage`, and text in the form of chat APIs:
    `{"type": "text", "text": …}`.
    """
    if isinstance(content, str):
        return [Text(content)]
    if isinstance(content, Sequence):
        return [_content_part(part) for part in content]
    raise PromptError(
        f"a message's content is {type(content).__name__}, expected str or Text and Passage parts"
    )


def _content_part(part: object) -> Part:
    if isinstance(part, Text | Passage):
        return part
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return Text(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(
        f"a message's content holds a part of type {kind!r}, expected text: this model reads text "
        'only, as str, Text, Passage or {"type": "text", "text": …}'
    )
