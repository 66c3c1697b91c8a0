"""When an answer is right: the metrics of SQuAD (Rajpurkar et al. 2016) and of the KVLink paper.

Knows strings only.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ABSENT = "The documents do not say"  # where they hold no answer: the wording that is scored

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contained(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normal form of any answer stands in that of the prediction: the paper's metric.

    An answer whose normal form is empty is never contained (the published scripts find it in
    everything).
    """
    said = normalized(prediction)
    return any(want in said for want in map(normalized, answers) if want)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction and any answer have one normal form."""
    said = normalized(prediction)
    return float(any(said == normalized(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 over the words of normal forms, the best over all answers."""
    return max((_f1(normalized(prediction), normalized(a)) for a in answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    said, wanted = prediction.split(), answer.split()
    common = sum((Counter(said) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
