"""Questions and the passages they are asked over, for benchmarks that answer.

Countries, from the package, or the rows of a question-answering set: every question, over the
passages of all rows. Knows no model.
"""

from __future__ import annotations

import argparse

from kvlink_rag import Document
from kvlink_rag.datasets import countries
from kvlink_rag.datasets.countries import Question
from kvlink_rag.datasets.rows import Source
from kvlink_rag.datasets.sets import Skipped, find_set, read


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--embedder", help="a directory, hub id or pair (small)")
    options.add_argument("--data", metavar="FILE", help="rows of a question-answering set instead")
    options.add_argument("--questions", type=int, default=180, help="at most")


def load_asked(arguments: argparse.Namespace) -> tuple[list[Document], list[Question]]:
    """The passages, and the questions, each with its answers and the ids of its gold passages."""
    if arguments.data is None:
        return countries.passages(), countries.questions()[: arguments.questions]
    examples = list(read(find_set("nq"), Source(arguments.data), Skipped()))
    texts = dict.fromkeys(document for example in examples for document in example.documents)
    known = {text: Document(text.text, text.title, id=str(n)) for n, text in enumerate(texts)}
    asked = [
        Question(
            example.question,
            example.answers,
            tuple(str(known[example.documents[i]].id) for i in example.gold),
        )
        for example in examples
    ]
    return list(known.values()), asked[: arguments.questions]
