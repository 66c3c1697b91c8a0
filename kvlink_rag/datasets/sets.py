"""The evaluation sets by name, and how their examples are read, filled up and arranged.

What cannot be used is counted by reason and skipped, or refused, as `on_bad` says.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, ExampleError

from .answers import contained
from .rows import Row, Source, rows
from .schemas import Example, multi_news, question_answering, samsum

log = logging.getLogger(__name__)

SHOWN = 5
TRIES = 40  # passages looked at for each distractor wanted

Metric = Literal["answers", "rouge"]
OnBad = Literal["skip", "refuse"]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A set by name. source: where the hub has it; metric: how predictions are scored."""

    name: str
    source: Source
    parse: Callable[[Row, int], Example]
    metric: Metric = "answers"


SETS: Mapping[str, DataSet] = {
    each.name: each
    for each in (
        DataSet(
            "nq", Source("google-research-datasets/nq_open", None, "validation"), question_answering
        ),
        DataSet(
            "2wikimultihopqa",
            Source("xanhho/2WikiMultihopQA", None, "validation"),
            question_answering,
        ),
        DataSet(
            "triviaqa",
            Source("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
            question_answering,
        ),
        DataSet(
            "hotpotqa", Source("hotpotqa/hotpot_qa", "distractor", "validation"), question_answering
        ),
        DataSet("musique", Source("dgslibisey/MuSiQue", None, "validation"), question_answering),
        DataSet("multinews", Source("alexfabbri/multi_news", None, "test"), multi_news, "rouge"),
        DataSet("samsum", Source("knkarthick/samsum", None, "test"), samsum, "rouge"),
    )
}


def find_set(name: str) -> DataSet:
    """The set called `name`. Raises `ConfigError`."""
    if name not in SETS:
        raise ConfigError(f"found data set {name!r}, expected one of {', '.join(SETS)}")
    return SETS[name]


@dataclass(slots=True)
class Skipped:
    """Counts what cannot be used, by reason; with "refuse" the first such thing is raised.

    The first few of each reason are logged as warnings, the others for who asks for all.
    """

    on_bad: OnBad = "skip"
    reasons: Counter[str] = field(default_factory=Counter)

    def __call__(self, kind: str, error: Exception) -> None:
        """kind: a few words to count under; error: what happened, logged or raised."""
        if self.on_bad == "refuse":
            raise error
        self.reasons[kind] += 1
        first = self.reasons[kind] <= SHOWN
        log.log(logging.WARNING if first else logging.DEBUG, "skipped: %s", error)


def read(data_set: DataSet, source: Source, skipped: Skipped) -> Iterator[Example]:
    """Examples in the order of their rows. Raises `ConfigError`, and `ExampleError` if refused."""
    for number, row in enumerate(rows(source)):
        if isinstance(row, ExampleError):
            skipped("not a JSON object", row)
            continue
        try:
            yield data_set.parse(row, number)
        except ExampleError as error:
            skipped("wrong schema", ExampleError(f"{source}, row {number}: {error}"))


def filled_up(examples: Sequence[Example], total: int, seed: int) -> list[Example]:
    """Each example with distractors up to `total` documents, drawn from the others' documents.

    A distractor holds none of the answers. The one document an oracle file gives is gold. The order
    is drawn at random; an example that has enough documents stays as it is, and one whose answer
    stands nearly everywhere ("S") may get fewer.
    """
    pool = list(dict.fromkeys(d for example in examples for d in example.documents))
    return [fill_up(each, pool, total, random.Random(f"{seed}-{each.id}")) for each in examples]


def fill_up(example: Example, pool: Sequence[Document], total: int, rng: random.Random) -> Example:
    """One example with distractors from `pool`; see `filled_up`."""
    documents = list(example.documents)
    gold = {documents[i] for i in example.gold} or set(documents if len(documents) == 1 else ())
    if len(documents) >= total:
        return example
    for at in rng.sample(range(len(pool)), min(len(pool), TRIES * total)):
        candidate = pool[at]
        if len(documents) == total:
            break
        if candidate not in documents and not contained(candidate.text, example.answers):
            documents.append(candidate)
    rng.shuffle(documents)
    return example.with_documents(documents, [i for i, d in enumerate(documents) if d in gold])


def gold_at(example: Example, place: int) -> Example:
    """The example with its one gold document at `place` (from 0), the others in their order.

    Raises `ExampleError` where there is not exactly one, or no such place.
    """
    if len(example.gold) != 1 or not 0 <= place < len(example.documents):
        raise ExampleError(
            f"example {example.id}: found {len(example.gold)} gold documents among "
            f"{len(example.documents)}, expected one gold document and a place from 0 for it"
        )
    others = list(example.documents)
    gold = others.pop(example.gold[0])
    others.insert(place, gold)
    return example.with_documents(others, (place,))
