"""Records to numbers: means with bootstrap intervals, differences, agreement, times.

Intervals are percentile bootstrap over examples (Efron 1979), 95 %: an example that was asked with
its gold document at several places counts once, with the mean over them. Knows records; no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
import numpy.typing as npt

from .records import Record
from .request import GROUPS, By

RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the 95 % interval around it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. gold_at: None over all places; kind, passages: None over all of them.

    difference: of the first score to the reference mode's on the same examples, paired; None for
    the reference itself. Times and counts are medians.
    """

    data_set: str
    model: str
    mode: str
    gold_at: int | None
    examples: int
    scores: Mapping[str, Interval]
    difference: Interval | None
    recall: float | None
    ttft_ms: float
    prompt_tokens: int
    computed_tokens: int
    kind: str | None = None
    passages: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether reuse said what the masked prefill said, example by example.

    ties: answers that first differ where the masked run's two best logits lie within `tolerance`,
    where rounding decides. differ: answers that differ elsewhere; each one is a fault.
    """

    model: str
    compared: int
    identical: int
    ties: int
    differ: int
    tolerance: float


def bootstrap(values: Sequence[float] | Floats, *, seed: int = 0) -> Interval:
    """The mean of `values` and its 95 % percentile interval over `RESAMPLES` resamples."""
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


def summarize(
    records: Iterable[Record], *, reference: str = "full", by: Sequence[By] = ()
) -> list[Line]:
    """The table: for each data set, model and mode all examples together, then each place of the
    gold document, then each group of examples that are alike in all that `by` names.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.data_set, record.model, record.mode), []).append(record)
    lines = []
    for (data_set, model, _), group in groups.items():
        against = groups.get((data_set, model, reference), [])
        lines.append(_line(group, against))
        placed = [r for r in group if r.gold_at is not None]
        if len({r.gold_at for r in placed}) > 1:
            lines += _split(placed, against, ("gold_at",))
        lines += _split(group, against, by) if by else []
    return lines


def _split(group: Sequence[Record], against: Sequence[Record], by: Sequence[str]) -> Iterator[Line]:
    """A line for each combination of the values of the fields `by`, in order."""
    parts: dict[tuple[Any, ...], list[Record]] = {}
    for record in group:
        parts.setdefault(tuple(getattr(record, name) for name in by), []).append(record)
    for values in sorted(parts):
        other = [r for r in against if tuple(getattr(r, name) for name in by) == values]
        yield replace(_line(parts[values], other), **dict(zip(by, values, strict=True)))


def _line(group: Sequence[Record], against: Sequence[Record]) -> Line:
    first = group[0]
    recalls = [r.recall for r in group if r.recall is not None]
    return Line(
        data_set=first.data_set,
        model=first.model,
        mode=first.mode,
        gold_at=None,
        examples=len({r.example for r in group}),
        scores={name: bootstrap(list(_by_example(group, name).values())) for name in first.scores},
        difference=_difference(group, against),
        recall=mean(recalls) if recalls else None,
        ttft_ms=median(r.ttft_ms for r in group),
        prompt_tokens=int(median(r.prompt_tokens for r in group)),
        computed_tokens=int(median(r.computed_tokens for r in group)),
    )


def _by_example(records: Iterable[Record], score: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record.example, []).append(record.scores[score])
    return {example: mean(values) for example, values in found.items()}


def _difference(group: Sequence[Record], against: Sequence[Record]) -> Interval | None:
    """Of the first score, paired by key, then averaged by example."""
    if not against or against[0].mode == group[0].mode:
        return None
    name = next(iter(group[0].scores))
    other = {r.key: r.scores[name] for r in against}
    pairs: dict[str, list[float]] = {}
    for r in group:
        if r.key in other:
            pairs.setdefault(r.example, []).append(r.scores[name] - other[r.key])
    return bootstrap([mean(values) for values in pairs.values()]) if pairs else None


def agreement(records: Iterable[Record], model: str, tolerance: float) -> Agreement:
    """Compare `reuse` with `masked` on one model, token by token."""
    of_model = [r for r in records if r.model == model]
    masked = {(r.data_set, r.key): r for r in of_model if r.mode == "masked"}
    counts = {"identical": 0, "ties": 0, "differ": 0}
    for record in of_model:
        wanted = masked.get((record.data_set, record.key))
        if record.mode == "reuse" and wanted is not None:
            counts[_verdict(record, wanted, tolerance)] += 1
    return Agreement(model, sum(counts.values()), **counts, tolerance=tolerance)


def _verdict(found: Record, wanted: Record, tolerance: float) -> str:
    pairs = zip(found.tokens, wanted.tokens, wanted.margins, strict=False)
    for token, expected, margin in pairs:
        if token != expected:
            return "ties" if margin <= tolerance else "differ"
    return "identical" if len(found.tokens) == len(wanted.tokens) else "differ"


def table(lines: Sequence[Line]) -> list[str]:
    """The lines as a Markdown table, scores in per cent with their 95 % intervals."""
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    groups = [name for name in GROUPS if any(getattr(line, name) is not None for line in lines)]
    head = ["set", "model", "mode", *groups, "gold at", "n", *names, "against full", "recall@k"]
    head += ["TTFT ms", "prompt tokens", "computed"]
    rows = [head, ["---"] * len(head), *(_cells(line, groups, names) for line in lines)]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def _cells(line: Line, groups: Sequence[str], names: Sequence[str]) -> list[str]:
    scores = [str(line.scores[n]) if n in line.scores else "" for n in names]
    return [
        line.data_set,
        line.model,
        line.mode,
        *(_over(getattr(line, name)) for name in groups),
        _over(line.gold_at),
        str(line.examples),
        *scores,
        "" if line.difference is None else str(line.difference),
        "" if line.recall is None else f"{100 * line.recall:.1f}",
        f"{line.ttft_ms:.1f}",
        str(line.prompt_tokens),
        str(line.computed_tokens),
    ]


def _over(value: int | str | None) -> str:
    return "all" if value is None else str(value)
