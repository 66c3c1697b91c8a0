"""The mixture as an endless stream of laid-out samples, the same for the same seed.

A run that goes on from a checkpoint reads the stream from its beginning and drops what it has
learned already, so that it learns what it would have. Knows rows and transforms; no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

from torch.utils.data import IterableDataset, get_worker_info

from kvlink_rag.datasets.rows import Row, Source, rows, shuffled
from kvlink_rag.datasets.sets import Skipped
from kvlink_rag.errors import ConfigError, ExampleError, PromptError
from kvlink_rag.prompt.layout import PartEncoder
from kvlink_rag.prompt.spec import Spec

from .config import FinetuneConfig, Part
from .questions import Asking, Shelf, known, known_rows
from .samples import Encoded, encode
from .transforms import TRANSFORMS, Format, Unwanted

GIVE_UP = 10_000  # rows of one data set in a row that could not be used
SHARED_TRIES = 16  # times a set's rows that one of several workers tries, who sees a share of them
ASKING = ("qa", "qa_full", "gaps")  # kinds whose rows have passages and are asked about them
POOL = 20_000  # rows whose questions and documents may join another row's


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample and the number of the data set that it is from."""

    sample: Encoded
    part: int


def part_rows(part: Part) -> Iterator[Row | ExampleError]:
    """The rows of one data set that are learned from."""
    found = islice(rows(Source(part.path, part.config, part.split)), part.first, part.last)
    return (row for row in found if not _is_long(row, part)) if part.answer_words else found


def _is_long(row: Row | ExampleError, part: Part) -> bool:
    """Whether the answer has more words than wanted; what cannot be read is not, here."""
    try:
        if isinstance(row, ExampleError):
            return False
        return len(known(row, 0, part.column).answer.split()) > part.answer_words
    except ExampleError:
        return False


def _form(form: Format, part: Part, absent_answer: str) -> Format:
    """`form` with the part's own settings, and the rows that others are asked together with."""
    shelf = Shelf()
    if part.kind in ASKING and (part.fill or part.absent or part.questions > 1):
        shelf = Shelf(known_rows(islice(part_rows(part), POOL), part.column))
    asking = Asking(
        documents=part.documents,
        fill=part.fill,
        fewest=part.fewest,
        questions=part.questions,
        absent=part.absent,
        absent_answer=absent_answer,
        shelf=shelf,
    )
    return replace(form, column=part.column, asking=asking)


class Mixture(IterableDataset[Encoded]):
    """Samples drawn from the config's data sets by their weights, without end.

    skipped: counts what could not be used, by reason. Several loader workers share the rows: each
    lays out its own. Iterating raises `ConfigError` where a data set gives nothing.
    """

    def __init__(self, config: FinetuneConfig, encoder: PartEncoder, form: Format) -> None:
        super().__init__()
        self.config, self.skipped = config, Skipped(config.on_bad)
        self._encoder = encoder
        self._form = form
        self._forms: list[Format] = []

    def __iter__(self) -> Iterator[Encoded]:
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        return (drawn.sample for drawn in self.draw(*share))

    def draw(self, worker: int = 0, workers: int = 1) -> Iterator[Drawn]:
        """Every sample of one of `workers`, in the order of the run."""
        self._forms = [
            _form(self._form, part, self.config.absent_answer) for part in self.config.data
        ]
        rng = random.Random(f"mixture-{self.config.seed}-{worker}")
        streams = [self._endless(number, worker, workers) for number in range(len(self._forms))]
        weights = [part.weight for part in self.config.data]
        while True:
            (number,) = rng.choices(range(len(streams)), weights)
            yield Drawn(next(streams[number]), number)

    def _endless(self, number: int, worker: int, workers: int) -> Iterator[Encoded]:
        """One data set again and again, in another order each time; of it, one worker's rows."""
        part, place, unused = self.config.data[number], 0, 0
        for epoch in count():
            order = random.Random(f"{self.config.seed}-{number}-{epoch}")
            rng = random.Random(f"{self.config.seed}-{number}-{epoch}-{worker}")
            began = place
            for at, row in shuffled(enumerate(part_rows(part)), order, self.config.shuffle):
                place += 1
                if place % workers != worker:
                    continue
                sample = self._sample(number, at, row, rng)
                unused = unused + 1 if sample is None else 0
                if sample is not None:
                    yield sample
                elif unused >= GIVE_UP:
                    break
            tried = (place - began) * (1 if workers == 1 else SHARED_TRIES)
            if place == began or unused >= min(GIVE_UP, tried):
                raise ConfigError(
                    f"no usable row in {part.path} for kind {part.kind} "
                    f"({dict(self.skipped.reasons) or 'it is empty'}); look at its columns, at "
                    "max_length, or name another kind"
                )

    def _sample(self, number: int, at: int, row: object, rng: random.Random) -> Encoded | None:
        part, form = self.config.data[number], self._forms[number]
        try:
            if isinstance(row, ExampleError):
                raise row
            sample = TRANSFORMS[part.kind](row, at, form, rng)  # type: ignore[arg-type]
            encoded = encode(sample, self._encoder, self._spec(rng), self.config.max_length)
            if not encoded.learned:
                raise ExampleError("nothing of it would be learned")
        except Unwanted:
            self.skipped.reasons[f"{part.kind}: left out by the recipe"] += 1
            return None
        except (ExampleError, PromptError) as error:
            self.skipped(f"{part.kind}: {type(error).__name__}", error)
            return None
        return encoded

    def _spec(self, rng: random.Random) -> Spec:
        """The model's spec, or for some samples the same without link tokens."""
        spec = self._form.spec
        if spec.links_per_passage and rng.random() >= self.config.links_share:
            return replace(spec, links_per_passage=0)
        return spec
