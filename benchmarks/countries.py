"""Right answers on texts that no adapter was trained on: those of the demonstration.

    python benchmarks/countries.py --model small
    python benchmarks/countries.py --model runs/gaps/adapter --passages 4 8 12

Every question of the demonstration (passages of The World Factbook; ten questions, two of them
without an answer there), over so many retrieved passages, by reuse and by full prefill. Right is an
answer that holds an expected one, or, where there is none, the fixed wording. Few questions: this
shows whether a tuned model lost something, not how good it is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile

from measuring import Row, finish, load, parser, show

from kvlink_rag import KVLinkRAG
from kvlink_rag.arguments import Mode
from kvlink_rag.datasets import countries
from kvlink_rag.datasets.answers import ABSENT, contained

EVERY = 6  # of the other passages, one in so many is there
MODES: tuple[Mode, ...] = ("reuse", "full")


def main() -> None:
    arguments = parse()
    questions = countries.questions()
    gold = {id for question in questions for id in question.gold}
    documents = [p for n, p in enumerate(countries.passages()) if p.id in gold or n % EVERY == 0]
    rows: list[Row] = []
    model = load(arguments)
    with (
        tempfile.TemporaryDirectory(dir=arguments.scratch) as directory,
        KVLinkRAG.open(directory, model=model, embedder=arguments.embedder) as rag,
    ):
        rag.add(documents)
        for mode in MODES:
            for k in arguments.passages:
                right = sum(is_right(rag, each, k, mode, arguments.tokens) for each in questions)
                rows.append({"mode": mode, "passages": k, "of": len(questions), "right": right})
    show(rows, ("mode", "passages", "of", "right"))
    finish(arguments, rows)


def is_right(rag: KVLinkRAG, question: countries.Question, k: int, mode: Mode, tokens: int) -> bool:
    said = rag.ask(question.question, k=k, mode=mode, max_new_tokens=tokens).text
    return contained(said, question.answers or (ABSENT,))


def parse() -> argparse.Namespace:
    options = parser(__doc__, model="small")
    options.add_argument("--embedder", default="small")
    options.add_argument("--passages", type=int, nargs="+", default=[2, 4, 6, 8, 10, 12])
    options.add_argument("--tokens", type=int, default=24, help="the most of an answer")
    return options.parse_args()


if __name__ == "__main__":
    main()
