"""Questions with their passages: which are asked together, over what, and which have no answer.

Passages cost far more than questions, so a set of passages is asked everything that is known about
it: each row's passages come with the questions of all rows whose gold passages are among them.
Knows rows and documents; no prompt and no tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvlink_rag.datasets.answers import contained
from kvlink_rag.datasets.rows import Row
from kvlink_rag.datasets.schemas import Example, question_answering
from kvlink_rag.datasets.sets import fill_up
from kvlink_rag.documents import Document
from kvlink_rag.errors import ExampleError

Asked = tuple[str, str]  # a question and the answer to learn
SPREAD = 2  # passages are drawn from that many times as many of the row's own, the first ones
TRIES = 8  # rows looked at for each question without an answer


@dataclass(frozen=True, slots=True)
class Known:
    """One row: its example, the answer to learn, and the documents that hold it."""

    example: Example
    answer: str
    gold: tuple[Document, ...]


class Shelf:
    """Rows of one data set, found by the documents that answer them."""

    def __init__(self, known: Iterable[Known] = ()) -> None:
        self.rows = list(known)
        self.documents = list(dict.fromkeys(d for row in self.rows for d in row.example.documents))
        self._by_document: dict[Document, list[Known]] = {}
        for row in self.rows:
            for document in row.gold[:1]:
                self._by_document.setdefault(document, []).append(row)

    def about(self, documents: Sequence[Document]) -> list[Known]:
        """The rows whose gold documents are all among `documents`."""
        among = set(documents)
        found = (row for document in documents for row in self._by_document.get(document, ()))
        return [row for row in found if among.issuperset(row.gold)]


@dataclass(frozen=True, slots=True)
class Asking:
    """How the questions of a data set get their passages; see `config.Part` for the numbers.

    shelf: the rows that other questions and distractors come from.
    """

    documents: int = 10
    fill: int = 0
    fewest: int = 0
    questions: int = 1
    absent: float = 0.0
    absent_answer: str = ""
    shelf: Shelf = field(default_factory=Shelf)


def known_rows(rows: Iterable[Row | ExampleError], column: str | None) -> Iterable[Known]:
    """The rows that can be used."""
    for number, row in enumerate(rows):
        with suppress(ExampleError):
            if not isinstance(row, ExampleError):
                yield known(row, number, column)


def known(row: Row, number: int, column: str | None) -> Known:
    """A row of any question-answering schema. Raises `ExampleError`.

    Where it does not say which of its documents are gold, all are.
    """
    example = question_answering(row, number)
    name = column or ("generated" if "generated" in row else None)
    answer = example.answers[0] if name is None else row.get(name)
    if not isinstance(answer, str) or not answer.strip():
        raise ExampleError(f"no usable column {name!r}; found {', '.join(sorted(row))}")
    gold = tuple(example.documents[i] for i in example.gold) or example.documents
    return Known(example, answer, gold)


def asked_together(
    row: Row, number: int, asking: Asking, column: str | None, rng: random.Random
) -> tuple[tuple[Document, ...], list[Asked]]:
    """The passages of one row, and what is asked about them. Raises `ExampleError`."""
    first = known(row, number, column)
    taken_away = rng.random() < asking.absent
    documents, left = passages_of(first, asking, rng, without_gold=taken_away)
    answered = [] if taken_away else [first]
    answered += [r for r in asking.shelf.about(documents) if not _same(r, first)]
    share = asking.absent / (1 - asking.absent)
    wanted = sum(rng.random() < share for _ in answered[: asking.questions]) or int(taken_away)
    near = ([first] if taken_away else []) + asking.shelf.about(left)
    absent = list(_unanswered(near, documents, asking, wanted, rng))
    room = asking.questions - len(absent)
    if len(answered) > room:
        answered = answered[:1] + rng.sample(answered[1:], room - 1) if room else []
    asked = [(each.example.question, each.answer) for each in answered]
    asked += [(each.example.question, asking.absent_answer) for each in absent]
    if not asked:
        raise ExampleError(f"example {first.example.id}: nothing can be asked of its passages")
    rng.shuffle(asked)
    return documents, asked


def passages_of(
    first: Known, asking: Asking, rng: random.Random, *, without_gold: bool = False
) -> tuple[tuple[Document, ...], list[Document]]:
    """The passages of the row `first`, and those of its own that were left out.

    Raises `ExampleError` where it has none.
    """
    example, total = first.example, asking.fill
    if asking.fewest:
        total = rng.randint(asking.fewest, asking.fill)
    if asking.fewest or without_gold:
        gold = () if without_gold else first.gold[:total]
        own = [d for d in example.documents if d not in first.gold]
        room = max(0, (total or asking.documents) - len(gold))
        drawn = rng.sample(own[: SPREAD * room], min(room, len(own)))
        example = example.with_documents([*gold, *drawn])
    filled = fill_up(example, asking.shelf.documents, total, rng).documents
    kept = [d for d in filled if not (without_gold and d in first.gold)][: asking.documents]
    if not kept:
        raise ExampleError(f"example {example.id} has no documents; retrieve some for it")
    if asking.fewest:
        rng.shuffle(kept)
    return tuple(kept), [d for d in first.example.documents if d not in kept]


def _unanswered(
    near: Sequence[Known],
    documents: Sequence[Document],
    asking: Asking,
    wanted: int,
    rng: random.Random,
) -> Iterator[Known]:
    """Up to `wanted` rows that `documents` hold no answer to: of `near` first, then any."""
    rows = asking.shelf.rows
    others = rng.sample(rows, min(len(rows), TRIES * wanted)) if wanted else []
    given: list[Known] = []
    for each in (*near[:1], *rng.sample(near[1:], max(0, len(near) - 1)), *others):
        if len(given) == wanted:
            break
        answers = (*each.example.answers, each.answer)
        held = any(contained(f"{d.title} {d.text}", answers) for d in documents)
        if not (held or set(each.gold) & set(documents) or any(_same(each, g) for g in given)):
            given.append(each)
    yield from given


def _same(one: Known, other: Known) -> bool:
    return one.example.question == other.example.question
