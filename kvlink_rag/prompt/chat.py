"""What a tokenizer's chat template writes around messages. Knows templates; knows no model.

A template is rendered once with a mark in place of each content and split at the marks: its own
stretches hold special tokens, contents never do.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

from kvlink_rag.documents import Part, Passage, Text
from kvlink_rag.errors import PromptError


def has_template(tokenizer: Any) -> bool:
    """Whether the Hugging Face `tokenizer` renders conversations itself."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_pieces(tokenizer: Any, roles: Sequence[str]) -> list[str]:
    """The special text before the content of each message, and what opens the answer after them.

    Raises `PromptError` where the template drops, repeats or reorders a content.
    """
    marks = [f"\ue000{uuid.uuid4().hex}\ue001" for _ in roles]
    rest = tokenizer.apply_chat_template(
        [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)],
        tokenize=False,
        add_generation_prompt=True,
    )
    pieces = []
    for mark in marks:
        if rest.count(mark) != 1:
            raise PromptError(
                "the chat template drops, repeats or reorders a message; give messages in an order "
                "that it accepts, usually system, then user and assistant in turn"
            )
        before, _, rest = rest.partition(mark)
        pieces.append(before)
    return [*pieces, rest]


def render(tokenizer: Any, roles: Sequence[str], contents: Sequence[Sequence[Part]]) -> list[Part]:
    """The template's stretches as special text, with the contents where it puts them."""
    pieces = template_pieces(tokenizer, roles)
    parts: list[Part] = []
    for before, content in zip(pieces, contents, strict=False):
        parts += [Text(before, special=True), *content]
    return [*parts, Text(pieces[-1], special=True)]


def checked_role(role: object) -> str:
    """A role stands in the template's own text, so it must not hold a special token."""
    if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", role):
        raise PromptError(f"a message's role is {role!r}, expected a word such as user")
    return role


def content_parts(content: object) -> list[Part]:
    """A message's content as parts. Raises `PromptError` for anything but text and parts."""
    if isinstance(content, str):
        return [Text(content)]
    if isinstance(content, Sequence) and all(isinstance(p, Text | Passage) for p in content):
        return list(content)
    raise PromptError(
        f"a message's content is {type(content).__name__}, expected str or Text and Passage parts"
    )
