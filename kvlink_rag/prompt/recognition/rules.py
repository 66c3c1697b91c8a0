"""What may not be recognised: the question, and an application's own prompts; whose title it is.

Knows how prompts are written by popular frameworks; knows no table and no catalog.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .stretches import Closed, Stretch

TITLE = 300  # characters of a title that is looked for before a text
LABEL = 60  # characters of the longest bare label
BARE_LABELS = 4  # that may end a prompt

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


def asking(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each message holds a question: the user's, with an answer or nothing after it."""
    roles = [message["role"] for message in messages]
    after = [*roles[1:], "assistant"] if roles else []
    return [pair == ("user", "assistant") for pair in zip(roles, after, strict=True)]
