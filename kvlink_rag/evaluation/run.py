"""One evaluation, top to bottom: cases and contenders to answers on disk.

Interrupted runs go on where they stopped. Each prompt is prefilled alone (that is its TTFT), then
a batch is decoded together. A case that one contender cannot take is left out for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvlink_rag.datasets.schemas import Example
from kvlink_rag.datasets.sets import Metric, Skipped, gold_at
from kvlink_rag.errors import ExampleError, PromptError

from .decoding import Decoded, decode
from .modes import Contender, InMemory, Started
from .records import Record, Records
from .scores import Score, scorer


@dataclass(frozen=True, slots=True)
class Case:
    """One example as it is asked. gold_at: where its gold document was put, if it was."""

    example: Example
    gold_at: int | None = None
    recall: float | None = None

    @property
    def key(self) -> str:
        """Unique in a run."""
        return self.example.id if self.gold_at is None else f"{self.example.id}@{self.gold_at}"


def at_positions(
    examples: Sequence[Example], positions: Sequence[int], skipped: Skipped
) -> Iterator[Case]:
    """Each example once for each place of its gold document; as it is where no place is given."""
    for example in examples:
        if not positions:
            yield Case(example)
        for place in positions:
            try:
                yield Case(gold_at(example, place), place)
            except ExampleError as error:
                skipped("gold position", error)


def usable(
    cases: Sequence[Case], contenders: Sequence[Contender], skipped: Skipped
) -> Iterator[Case]:
    """Cases with documents and a key of their own, whose prompt every contender can take."""
    seen: set[str] = set()
    for case in cases:
        try:
            if case.key in seen:
                raise ExampleError(f"example {case.key}: there are two with this id")
            if not case.example.documents:
                raise ExampleError(
                    f"example {case.key}: it has no documents; retrieve some with --retrieve"
                )
            for contender in contenders:
                contender.model.layout(contender.prompt(case.example))
        except (ExampleError, PromptError) as error:
            skipped(type(error).__name__, error)
            continue
        seen.add(case.key)
        yield case


def evaluate(
    contenders: Sequence[Contender],
    cases: Sequence[Case],
    records: Records,
    *,
    data_set: str,
    metric: Metric,
    batch: int,
    most: int,
    advance: Callable[[int], object] = lambda answers: None,
) -> None:
    """Answer every case with every contender, but for what `records` holds already.

    batch: prompts decoded together. most: tokens an answer. advance: told of answers as they come.
    """
    score = scorer(metric)
    advance(sum((c.name, case.key) in records.done for c in contenders for case in cases))
    for start in range(0, len(cases), batch):
        for contender in contenders:
            todo = [
                case
                for case in cases[start : start + batch]
                if (contender.name, case.key) not in records.done
            ]
            for record in _answer(contender, todo, data_set, score, most):
                records.add(record)
                advance(1)


def _answer(
    contender: Contender, cases: Sequence[Case], data_set: str, score: Score, most: int
) -> Iterator[Record]:
    if not cases:
        return
    memory = InMemory(contender.model)
    started = [contender(contender.prompt(case.example), memory) for case in cases]
    answers = decode(contender.model, started, most)
    for case, prompt, answer in zip(cases, started, answers, strict=True):
        yield _record(contender, case, prompt, answer, data_set, score)


def _record(
    contender: Contender, case: Case, prompt: Started, answer: Decoded, data_set: str, score: Score
) -> Record:
    text, trace = answer.text.strip(), prompt.trace
    return Record(
        data_set=data_set,
        model=contender.model.name,
        mode=contender.name,
        key=case.key,
        question=case.example.question,
        answers=case.example.answers,
        prediction=text,
        scores=score(text, case.example.answers),
        gold_at=case.gold_at,
        recall=case.recall,
        ttft_ms=round(trace.first_token_ms, 3),
        prompt_tokens=prompt.position,
        reused_tokens=trace.reused_tokens,
        computed_tokens=trace.computed_tokens,
        tokens=tuple(answer.tokens),
        margins=tuple(round(margin, 6) for margin in answer.margins),
        kind=case.example.kind,
        passages=len(case.example.documents),
    )
