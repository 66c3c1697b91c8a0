"""Hits by score against hits by id: what the prefix cache saves, and what answers it costs.

    python benchmarks/order.py --documents 10 20 40 0

Questions, of a file or about the countries of the demonstration, over a collection of the documents
that the first of them need (0: all documents); asked are the questions whose documents are there,
each once with hits by score and once by id (`KVLinkRAG.ask`, k = 10), by turns. Each order has kept
runs of its own, of the default size. Both must find the same hits.
    computed, kept   tokens of a prompt beside its passages: run through the model, or taken from
                     runs that earlier questions left; kept_share is kept / (computed + kept)
    ttft             retrieval included
    right            answers that hold an expected one
The last line is one JSON object.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from asked import add_options, load_asked
from measuring import Row, draw, finish, load, median, parser, percentile, refuse, show

from kvlink_rag import Answer, Document, KVLinkModel, KVLinkRAG
from kvlink_rag.arguments import ORDERS
from kvlink_rag.datasets.countries import Question
from kvlink_rag.pretrained.known import DEFAULT

PASSAGES, ANSWER_TOKENS = 10, 48
COLUMNS = ("documents", "order", "questions", "computed_tokens", "kept_tokens", "kept_share",
           "ttft_p50_ms", "ttft_p95_ms", "right")  # fmt: skip


def main() -> None:
    arguments = parse()
    model = load(arguments)
    rows: list[Row] = []
    for count in arguments.documents:
        rows += measure(model, count, arguments)
        show(rows[-len(ORDERS) :], COLUMNS)
    draw(arguments.figure, lambda axes: plot(axes, rows), title=f"Kept runs, {model.name}")
    finish(arguments, rows)


def measure(model: KVLinkModel, count: int, arguments: Any) -> list[Row]:
    """One size of the collection: a row for each order."""
    documents, asked = chosen(*load_asked(arguments), count)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        directory = Path(name) / "collection"
        with KVLinkRAG.open(directory, model=model, embedder=arguments.embedder) as rag:
            rag.add(documents)
            embedder = rag.embedder
        answers = ask_by_turns(model, embedder, directory, asked)
    return [row(len(documents), order, asked, found) for order, found in answers.items()]


def chosen(
    documents: list[Document], asked: list[Question], count: int
) -> tuple[list[Document], list[Question]]:
    """`count` documents (0: all), those that the first questions need, and all they answer."""
    known = {str(document.id): document for document in documents}
    needed = dict.fromkeys(id for question in asked for id in question.gold)
    kept = list({**needed, **dict.fromkeys(known)})[: count or None]
    answered = [q for q in asked if set(q.gold) <= set(kept) and (q.gold or not count)]
    return [known[id] for id in kept], answered


def ask_by_turns(
    model: KVLinkModel, embedder: Any, directory: Path, asked: list[Question]
) -> dict[str, list[Answer]]:
    """All questions, in each order, over kept runs of its own."""
    opened = {o: KVLinkRAG.open(directory, model=model, embedder=embedder) for o in ORDERS}
    answers: dict[str, list[Answer]] = {order: [] for order in ORDERS}
    for rag in opened.values():  # to warm up
        rag.ask("w", k=PASSAGES, max_new_tokens=1)
        rag.reuse.prefix.clear()
    for question in asked:
        for order, rag in opened.items():
            answer = rag.ask(
                question.question,
                k=PASSAGES,
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


def row(documents: int, order: str, asked: list[Question], answers: list[Answer]) -> Row:
    """Means of tokens, percentiles of times, share of right answers."""
    traces = [answer.trace for answer in answers]
    computed = sum(trace.computed_tokens for trace in traces)
    kept = sum(trace.prefix_tokens for trace in traces)
    right = [
        question.is_right(answer.text) for answer, question in zip(answers, asked, strict=True)
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
        "right": round(sum(right) / len(right), 4),
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
    axes.set_ylim(0, None)
    axes.set_ylabel("tokens beside passages taken from kept runs (%)")
    axes.legend()


def parse() -> Any:
    options = parser(__doc__, model=DEFAULT, dtype="auto")
    add_options(options)
    options.add_argument("--documents", type=int, nargs="+", default=[10, 20, 40, 0], metavar="N")
    return options.parse_args()


if __name__ == "__main__":
    main()
