"""Answers over real passages: with the gold passage among them, and with it taken out.

    python benchmarks/answers.py --model runs/small5/adapter --data retrieved.jsonl
    python benchmarks/answers.py --model runs/small5/adapter --data oracle.jsonl --first 2155

Rows are of any question-answering schema that marks its gold passages (an only passage is gold).
Each question has `--documents` passages: the row's own in their order, the gold one at its place
or last, and where there are fewer, passages of other rows, in an order drawn at random. Modes are
those of `kvlink-rag eval`: closed, full, reuse, reuse:0 (without link tokens), naive, and others.
    contained   the answer stands in what was said (up to `--tokens` tokens, greedy)
    nll         nats a token of the first answer of the set, its end included
    refused     the fixed wording was said: wrongly where the gold passage is there, else rightly
Without their gold passage only questions count whose other passages hold no answer. Intervals are
95 %, bootstrap over questions; differences are paired with the first mode. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import Row, finish, load, parser, show

from kvlink_rag import Document
from kvlink_rag.datasets.answers import contained, normalized
from kvlink_rag.datasets.rows import Source
from kvlink_rag.datasets.schemas import Example
from kvlink_rag.datasets.sets import Skipped, fill_up, find_set, read
from kvlink_rag.evaluation.decoding import decode, likelihood
from kvlink_rag.evaluation.modes import CLOSED, Contender, InMemory, contenders
from kvlink_rag.evaluation.summary import bootstrap

MODES = "full,closed,reuse,reuse:0,naive"
COLUMNS = (
    "gold",
    "mode",
    "questions",
    "score",
    "value",
    "low",
    "high",
    "against",
    "d_low",
    "d_high",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question over its passages. answerable: whether one of them is gold."""

    example: Example
    answerable: bool


def main() -> None:
    arguments = parse()
    model = load(arguments)
    compared = list(contenders(model, arguments.modes.split(",")))
    seen: list[dict[str, Any]] = []
    out = Path(arguments.out) if arguments.out else None
    for asked in questions(arguments):
        snapshots = InMemory(model)  # the same for all modes
        for contender in compared:
            if contender.name == CLOSED and not asked.answerable:
                continue
            seen.append(answer(contender, asked, snapshots, arguments))
            if out is not None:
                with out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(seen[-1], ensure_ascii=False) + "\n")
    rows = [row for answerable in (True, False) for row in judged(seen, answerable)]
    show(rows, COLUMNS)
    finish(arguments, rows)


def questions(arguments: argparse.Namespace) -> Iterator[Asked]:
    """Each question with its gold passage, and without it where that leaves no answer."""
    pool = list(read(find_set("nq"), Source(arguments.data), Skipped()))
    others = list(dict.fromkeys(document for each in pool for document in each.documents))
    last = None if arguments.limit is None else arguments.first + arguments.limit
    unanswered = len(pool) if arguments.unanswered is None else arguments.unanswered
    for number, example in enumerate(islice(pool, arguments.first, last)):
        gold = [example.documents[i] for i in example.gold] or list(example.documents[:1])
        for answerable in (True, False)[: 1 + (number < unanswered)]:
            rng = random.Random(f"{arguments.seed}-{example.id}-{answerable}")
            chosen = passages(example, gold, others, arguments.documents, answerable, rng)
            held = any(contained(f"{d.title} {d.text}", example.answers) for d in chosen)
            if answerable or not held:
                yield Asked(example.with_documents(chosen), answerable)


def passages(
    example: Example,
    gold: Sequence[Document],
    others: Sequence[Document],
    count: int,
    answerable: bool,
    rng: random.Random,
) -> Sequence[Document]:
    """`count` passages, the gold ones among them or not."""
    own = [d for d in example.documents if answerable or d not in gold]
    missing = [d for d in gold if answerable and d not in own[:count]]
    own = [*own[: count - len(missing)], *missing]
    if len(own) >= count:
        return own
    wanted = [d for d in others if answerable or d not in gold]
    return fill_up(example.with_documents(own), wanted, count, rng).documents


def answer(
    contender: Contender, asked: Asked, snapshots: InMemory, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What one mode says to one question, and how likely it takes the right answer to be."""
    example, model = asked.example, contender.model
    started = contender(contender.prompt(example), snapshots)
    (said,) = decode(model, [started], arguments.tokens)
    wanted = example.answers[0] if asked.answerable else arguments.absent
    text = said.text.strip()
    return {
        "question": example.question,
        "answerable": asked.answerable,
        "mode": contender.name,
        "said": text,
        "contained": float(contained(text, example.answers)),
        "nll": likelihood(model, started, wanted),
        "refused": float(normalized(text).startswith(normalized(arguments.absent))),
    }


def judged(seen: Sequence[dict[str, Any]], answerable: bool) -> Iterator[Row]:
    """Means, and differences to the first mode on the same questions."""
    by_mode: dict[str, dict[str, dict[str, Any]]] = {}
    for each in seen:
        if each["answerable"] == answerable:
            by_mode.setdefault(each["mode"], {})[each["question"]] = each
    if not by_mode:
        return
    reference = next(iter(by_mode.values()))
    for mode, answers in by_mode.items():
        for score in ("contained", "nll", "refused") if answerable else ("nll", "refused"):
            whole = bootstrap([each[score] for each in answers.values()])
            apart = [
                each[score] - reference[question][score]
                for question, each in answers.items()
                if question in reference
            ]
            difference = bootstrap(apart)
            yield {
                "gold": answerable,
                "mode": mode,
                "questions": len(answers),
                "score": score,
                "value": round(whole.mean, 4),
                "low": round(whole.low, 4),
                "high": round(whole.high, 4),
                "against": round(difference.mean, 4),
                "d_low": round(difference.low, 4),
                "d_high": round(difference.high, 4),
            }


def parse() -> argparse.Namespace:
    options = parser(__doc__, dtype="float32")
    options.add_argument("--data", required=True, help="rows: JSONL, JSON or parquet")
    options.add_argument("--first", type=int, default=0, help="the first row that is asked")
    options.add_argument("--limit", type=int, help="rows that are asked (default: all)")
    options.add_argument(
        "--unanswered", type=int, help="rows asked without their gold passage too (default: all)"
    )
    options.add_argument("--documents", type=int, default=10, help="passages a question")
    options.add_argument("--modes", default=MODES)
    options.add_argument("--tokens", type=int, default=32, help="the most of an answer")
    options.add_argument("--absent", default="The documents do not say.", help="the fixed wording")
    options.add_argument("--out", help="a file that every answer is added to, a JSON line each")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


if __name__ == "__main__":
    main()
