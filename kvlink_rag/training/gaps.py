"""Gaps to fill: questions without end about any passages, answered by words that stand in them.

Sets of written questions are small and a long run learns them by heart. A gap is found by what
stands around it and answered by copying, which is what reading over blind passages has to learn.
Some ask what a passage is about, which is its title. Knows texts and documents; no prompt and no
tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import regex

from kvlink_rag.datasets.answers import contained, normalized
from kvlink_rag.datasets.rows import Row
from kvlink_rag.documents import Document

from .questions import Asked, Asking, known, passages_of

ASKED = "Fill in the gap: {before} ___ {after}"
ASKED_TITLE = "Of what is this said: {words}"
TITLES = 0.3  # the share of gaps that ask for a title
NAMED = r"(?:\p{Lu}[\w'’.&-]*\w|\d[\d,.:/-]*\d|\d)"  # a word with a capital, or a number
SPAN = regex.compile(  # in the midst of a sentence, whose first word says nothing by its capital
    rf"(?<=[\p{{Ll}},;(]\s){NAMED}(?:\s+(?:(?:of|the|and|de)\s+)?{NAMED})*"
    r"""(?=[,;:.)?!'"’”]*(?:\s|$))"""  # whole: of 3.5% neither 3 nor 3.5
)
LONGEST = 5  # words of an answer
AROUND = (4, 10)  # words before a gap, and after it
QUOTED = (6, 14)  # words by which a title is asked for
TRIES = 4  # gaps looked at for each that is asked


def gaps_together(
    row: Row, number: int, asking: Asking, column: str | None, rng: random.Random
) -> tuple[tuple[Document, ...], list[Asked]]:
    """The passages of one row, and gaps in any of them; some in passages that are not there.

    Raises `ExampleError`.
    """
    documents, left = passages_of(known(row, number, column), asking, rng)
    elsewhere = left or [d for d in asking.shelf.documents if d not in documents]
    absent = sum(rng.random() < asking.absent for _ in range(asking.questions))
    asked = list(_gaps(documents, asking.questions - absent, rng))
    held = " ".join(f"{each.title} {each.text}" for each in documents)
    asked += [
        (question, asking.absent_answer)
        for question, answer in _gaps(elsewhere, absent, rng)
        if not contained(held, (answer,))
    ]
    rng.shuffle(asked)
    return documents, asked


def gap(text: str, rng: random.Random) -> Asked | None:
    """One gap of `text` and what fills it, or None where there is none to find."""
    spans = [
        found
        for found in SPAN.finditer(text)
        if len(found[0].split()) <= LONGEST and normalized(found[0])
    ]
    if not spans:
        return None
    span = rng.choice(spans)
    before = text[: span.start()].split()[-rng.randint(*AROUND) :]
    after = text[span.end() :].split()[: rng.randint(*AROUND)]
    around = " ".join((*before, *after))
    if len(before) + len(after) < AROUND[0] or contained(around, (span[0],)):
        return None
    return ASKED.format(before=" ".join(before), after=" ".join(after)).strip(), span[0]


def title_of(document: Document, rng: random.Random) -> Asked | None:
    """Some words of a passage and its title, or None where it has none that can be asked for."""
    title, words = document.title.strip(), document.text.split()
    start = rng.randrange(max(1, len(words) - QUOTED[0]))
    quoted = words[start : start + rng.randint(*QUOTED)]
    short = any(map(str.isalnum, title)) and len(title.split()) <= LONGEST
    if not short or len(quoted) < QUOTED[0] or contained(" ".join(quoted), (title,)):
        return None
    return ASKED_TITLE.format(words=" ".join(quoted)), title


def _drawn(document: Document, rng: random.Random) -> Asked | None:
    titled = rng.random() < TITLES
    return title_of(document, rng) if titled else gap(document.text, rng)


def _gaps(documents: Sequence[Document], count: int, rng: random.Random) -> Iterator[Asked]:
    """Up to `count` gaps of documents drawn at random, no two with one answer."""
    found: dict[str, str] = {}
    for _ in range(TRIES * count if documents else 0):
        if len(found) == count:
            break
        if (drawn := _drawn(rng.choice(documents), rng)) is not None:
            found.setdefault(drawn[1], drawn[0])
    yield from ((question, answer) for answer, question in found.items())
