"""Answers end to end: all passages of a data set indexed, questions asked of the collection.

    python benchmarks/end_to_end.py --model small --data oracle.jsonl --first 2155 --limit 100

Every passage of the set goes into one collection by the pair's own embedder, encoded as it is added
(codec as a user gets it). Each question retrieves `-k` passages and is answered from stored
snapshots and, over the same passages, by full prefill (`--modes`).
    recall      the gold passage is among those retrieved
    contained   the answer stands in what was said (up to `--tokens` tokens, greedy)
    refused     the fixed wording was said
    ttft_ms     to the first token, medians; every question is new, so nothing of it is kept
Intervals are 95 %, bootstrap over questions; differences are paired with the first mode. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path

from measuring import Row, finish, load, median, parser, show

from kvlink_rag import KVLinkRAG
from kvlink_rag.datasets.answers import contained, normalized
from kvlink_rag.datasets.rows import Source
from kvlink_rag.datasets.sets import Skipped, find_set, read
from kvlink_rag.evaluation.summary import bootstrap

COLUMNS = ("mode", "questions", "recall", "contained", "low", "high", "against", "d_low", "d_high",
           "refused", "ttft_ms", "prompt_tokens")  # fmt: skip
Answers = list[dict[str, float]]


def main() -> None:
    arguments = parse()
    model = load(arguments)
    examples = list(read(find_set("nq"), Source(arguments.data), Skipped()))
    documents = list(dict.fromkeys(d for each in examples for d in each.documents))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        place = Path(arguments.collection or directory)
        with KVLinkRAG.open(place, model=model, embedder=arguments.embedder) as rag:
            rag.add(documents, show_progress=True)
            last = None if arguments.limit is None else arguments.first + arguments.limit
            found: dict[str, Answers] = {mode: [] for mode in arguments.modes.split(",")}
            for example in islice(examples, arguments.first, last):
                gold = {example.documents[i].text for i in example.gold or (0,)}
                for mode, answers in found.items():
                    answer = rag.ask(
                        example.question, k=arguments.k, mode=mode, max_new_tokens=arguments.tokens
                    )
                    text, trace = answer.text.strip(), answer.trace
                    answers.append(
                        {
                            "recall": float(any(h.document.text in gold for h in answer.hits)),
                            "contained": float(contained(text, example.answers)),
                            "refused": float(
                                normalized(text).startswith(normalized(arguments.absent))
                            ),
                            "ttft_ms": trace.first_token_ms - trace.retrieval_ms,
                            "tokens": trace.computed_tokens + trace.reused_tokens,
                        }
                    )
    rows = [row(mode, answers, next(iter(found.values()))) for mode, answers in found.items()]
    print(f"{len(documents)} passages")
    show(rows, COLUMNS)
    finish(arguments, rows)


def row(mode: str, answers: Answers, reference: Answers) -> Row:
    whole = bootstrap([each["contained"] for each in answers])
    apart = bootstrap(
        [a["contained"] - b["contained"] for a, b in zip(answers, reference, strict=True)]
    )
    return {
        "mode": mode,
        "questions": len(answers),
        "recall": round(sum(each["recall"] for each in answers) / len(answers), 4),
        "contained": round(whole.mean, 4),
        "low": round(whole.low, 4),
        "high": round(whole.high, 4),
        "against": round(apart.mean, 4),
        "d_low": round(apart.low, 4),
        "d_high": round(apart.high, 4),
        "refused": round(sum(each["refused"] for each in answers) / len(answers), 4),
        "ttft_ms": round(median([each["ttft_ms"] for each in answers]), 1),
        "prompt_tokens": median([each["tokens"] for each in answers]),
    }


def parse() -> argparse.Namespace:
    options = parser(__doc__, dtype="auto")
    options.add_argument("--data", required=True, help="rows: JSONL, JSON or parquet")
    options.add_argument("--first", type=int, default=0, help="the first row that is asked")
    options.add_argument("--limit", type=int, help="rows that are asked (default: all)")
    options.add_argument("--embedder", default="small")
    options.add_argument("--collection", help="keep the collection here (default: thrown away)")
    options.add_argument("-k", type=int, default=10, help="passages a question")
    options.add_argument("--modes", default="full,reuse")
    options.add_argument("--tokens", type=int, default=32, help="the most of an answer")
    options.add_argument("--absent", default="The documents do not say.", help="the fixed wording")
    return options.parse_args()


if __name__ == "__main__":
    main()
