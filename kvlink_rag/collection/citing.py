"""Which passages an answer cites: those that share most words with it. Knows text."""

from __future__ import annotations

import re
from collections.abc import Mapping

CITED = 3  # passages cited in an answer's line at most
_WORDS = re.compile(r"\w{4,}|\d+")


def cited(answer: str, question: str, passages: Mapping[int, str]) -> list[int]:
    """Numbers of the passages that hold most of the words that `answer` adds to `question`.

    Those that hold as many as any does, `CITED` at most, the latest first; none where no passage
    holds half of them, or no more than one word that is no number. It compares words; what the
    model looked at is not known.
    """
    said = _words(answer) - _words(question)
    held = {number: said & _words(text) for number, text in passages.items()}
    most = max(map(len, held.values()), default=0)
    shared = [number for number, words in held.items() if len(words) == most]
    telling = [number for number in shared if most > 1 or any(map(str.isdigit, held[number]))]
    return sorted(telling, reverse=True)[:CITED] if 2 * most >= len(said) else []


def _words(text: str) -> set[str]:
    return set(_WORDS.findall(text.lower()))
