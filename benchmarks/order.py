"""Hits by score against hits by id: what the prefix cache saves, and what answers it costs.

    python benchmarks/order.py --documents 10 20 40 0

The bundled pair answers the bundled questions over a collection of the documents that the first of
them need (0: all documents); asked are the questions whose documents are there, each once with
hits by score and once by id (`KVLinkRAG.ask`, k = 10, two rounds), by turns. Each order has kept
runs of its own, of the default size. Both must find the same hits.
    computed, kept   tokens of a prompt beside its passages: run through the model, or taken from
                     runs that earlier questions left; kept_share is kept / (computed + kept)
    ttft             retrieval included
    exact_match      answers whose final part is the expected one
The last line is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from measuring import Row, draw, finish, load, median, parser, percentile, refuse, show

from kvlink_rag import Answer, Document, KVLinkModel, KVLinkRAG
from kvlink_rag.arguments import ORDERS
from kvlink_rag.cli.demo import Example, load_documents
from kvlink_rag.disk.model_files import BUNDLED, BUNDLED_DIRECTORY
from kvlink_rag.training.questions import final_answer

PASSAGES, ROUNDS, ANSWER_TOKENS = 10, 2, 48
COLUMNS = ("documents", "order", "questions", "computed_tokens", "kept_tokens", "kept_share",
           "ttft_p50_ms", "ttft_p95_ms", "exact_match")  # fmt: skip


def main() -> None:
    arguments = parse()
    model = load(arguments)
    rows: list[Row] = []
    for count in arguments.documents:
        rows += measure(model, count, arguments.questions, arguments.scratch)
        show(rows[-len(ORDERS) :], COLUMNS)
    draw(arguments.figure, lambda axes: plot(axes, rows), title=f"Kept runs, {model.name}")
    finish(arguments, rows)


def measure(model: KVLinkModel, count: int, most: int, scratch: str | None) -> list[Row]:
    """One size of the collection: a row for each order."""
    documents, asked = chosen(count)
    asked = asked[:most]
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        directory = Path(name) / "collection"
        with KVLinkRAG.open(directory, model=model) as rag:
            rag.add(documents)
            embedder = rag.embedder
        answers = ask_by_turns(model, embedder, directory, asked)
    return [row(len(documents), order, asked, found) for order, found in answers.items()]


def chosen(count: int) -> tuple[list[Document], list[Example]]:
    """`count` documents (0: all), those that the first questions need, and all they answer."""
    documents = {str(document.id): document for document in load_documents(BUNDLED_DIRECTORY)}
    lines = (BUNDLED_DIRECTORY / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [Example(**{**row, "gold": tuple(row["gold"])}) for row in map(json.loads, lines)]
    needed = dict.fromkeys(id for example in examples for id in example.gold)
    kept = list({**needed, **dict.fromkeys(documents)})[: count or None]
    asked = [e for e in examples if set(e.gold) <= set(kept) and (e.gold or not count)]
    return [documents[id] for id in kept], asked


def ask_by_turns(
    model: KVLinkModel, embedder: Any, directory: Path, asked: list[Example]
) -> dict[str, list[Answer]]:
    """All questions, in each order, over kept runs of its own."""
    opened = {o: KVLinkRAG.open(directory, model=model, embedder=embedder) for o in ORDERS}
    answers: dict[str, list[Answer]] = {order: [] for order in ORDERS}
    for rag in opened.values():  # to warm up
        rag.ask("w", k=PASSAGES, rounds=ROUNDS, max_new_tokens=1)
        rag.reuse.prefix.clear()
    for example in asked:
        for order, rag in opened.items():
            answer = rag.ask(
                example.question,
                k=PASSAGES,
                rounds=ROUNDS,
                order=order,
                max_new_tokens=ANSWER_TOKENS,
            )
            if answer.trace.snapshots_encoded:
                refuse(f"a snapshot was encoded, not read ({answer.trace})")
            answers[order].append(answer)
        if len({tuple(h.document.id for h in found[-1].hits) for found in answers.values()}) != 1:
            refuse("the two orders found other hits")
    for rag in opened.values():
        rag.close()
    return answers


def row(documents: int, order: str, asked: list[Example], answers: list[Answer]) -> Row:
    """Means of tokens, percentiles of times, share of right answers."""
    traces = [answer.trace for answer in answers]
    computed = sum(trace.computed_tokens for trace in traces)
    kept = sum(trace.prefix_tokens for trace in traces)
    right = [
        final_answer(answer.text) == final_answer(example.answer)
        for answer, example in zip(answers, asked, strict=True)
    ]
    taken = [trace.first_token_ms for trace in traces]
    return {
        "documents": documents,
        "order": order,
        "questions": len(asked),
        "computed_tokens": round(computed / len(asked), 1),
        "kept_tokens": round(kept / len(asked), 1),
        "kept_share": round(kept / (computed + kept), 4),
        "ttft_p50_ms": round(median(taken), 3),
        "ttft_p95_ms": round(percentile(taken, 0.95), 3),
        "exact_match": round(sum(right) / len(right), 4),
    }


def plot(axes: Any, rows: list[Row]) -> None:
    """The share of tokens kept over the collection's size, a line for each order."""
    for order in ORDERS:
        mine = sorted((row for row in rows if row["order"] == order), key=lambda r: r["documents"])
        axes.plot(
            [row["documents"] for row in mine],
            [100 * row["kept_share"] for row in mine],
            marker="o",
            label=f"by {order}",
        )
    axes.set_xscale("log")
    axes.set_xlabel("documents in the collection")
    axes.set_ylabel("tokens beside passages taken from kept runs (%)")
    axes.legend()


def parse() -> Any:
    options = parser(__doc__, model=BUNDLED, dtype="auto")
    options.add_argument("--documents", type=int, nargs="+", default=[10, 20, 40, 0], metavar="N")
    options.add_argument("--questions", type=int, default=180, help="for each size, at most")
    return options.parse_args()


if __name__ == "__main__":
    main()
