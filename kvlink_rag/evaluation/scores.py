"""How good a prediction is, by the metric of its data set. Knows strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvlink_rag.datasets.answers import contained, exact_match, f1
from kvlink_rag.datasets.sets import Metric
from kvlink_rag.errors import MissingExtra

Score = Callable[[str, Sequence[str]], dict[str, float]]


def scorer(metric: Metric) -> Score:
    """The function that scores a prediction. Raises `MissingExtra` (ROUGE)."""
    if metric == "rouge":
        return _rouge()
    return _answers


def _answers(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    return {
        "contained": float(contained(prediction, answers)),
        "exact_match": exact_match(prediction, answers),
        "f1": f1(prediction, answers),
    }


def _rouge() -> Score:
    """ROUGE-L, F-measure with stemming, the best over references."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra.of("rouge-score", "eval", "ROUGE-L") from error
    rouge = RougeScorer(["rougeL"], use_stemmer=True)

    def score(prediction: str, answers: Sequence[str]) -> dict[str, float]:
        found = [rouge.score(answer, prediction)["rougeL"].fmeasure for answer in answers]
        return {"rouge_l": float(max(found))}

    return score
