"""Rows for training and evaluation: each question with the passages an embedder retrieves for it.

    python -m kvlink_rag.training.distractors --data nq_qed_train.jsonl \\
        --data nq_open_oracle.jsonl:1-2155 --without nq_open_oracle.jsonl:35,96 \\
        --embedder DIR --documents 24 --out retrieved.jsonl --plain plain.jsonl

Distractors that are near are harder than random ones, and what an application meets. The passages
are those of all rows read (and of `--pool`), in the order of their scores; gold passages that were
not found stand last. `--plain` has the same rows with their gold passages alone. With `--sentences`
every second question begins with a capital and ends with a question mark, as people write. Knows
rows and an embedder; no model and no tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlink_rag.datasets.rows import Source, rows
from kvlink_rag.datasets.schemas import Example, question_answering
from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, ExampleError, KVLinkError
from kvlink_rag.retrieval.embedder import Embedder
from kvlink_rag.retrieval.embedder_kinds import load_embedder
from kvlink_rag.retrieval.rounds import embedded_text

BATCH = 256


def read_rows(names: Sequence[str], without: Sequence[str]) -> list[Example]:
    """Rows of `FILE` or `FILE:FIRST-LAST` (from 1, both among them), but those of `without`."""
    left_out = {(file, number) for each in without for file, number in _numbers(each)}
    found = []
    for name in names:
        path, first, last = _span(name)
        for number, row in enumerate(rows(Source(path)), start=1):
            wanted = first <= number <= last and (Path(path).name, number) not in left_out
            if wanted and not isinstance(row, ExampleError):
                found.append(question_answering(row, number))
    if not found:
        raise ConfigError(f"found no rows in {', '.join(names)}")
    return found


def _span(name: str) -> tuple[str, int, int]:
    path, colon, span = name.rpartition(":")
    if not colon:
        return name, 1, sys.maxsize
    first, _, last = span.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"found {name!r}, expected FILE or FILE:FIRST-LAST, rows from 1")
    return path, int(first), int(last)


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    path, _, numbers = name.rpartition(":")
    for number in numbers.split(","):
        if not number.strip().isdecimal():
            raise ConfigError(f"found {name!r}, expected FILE:LINE,LINE,…, rows from 1")
        yield Path(path).name, int(number)


def gold_of(example: Example) -> list[Document]:
    """The documents that answer: those marked, else all that the row has."""
    return [example.documents[i] for i in example.gold] or list(example.documents)


def retrieved(
    examples: Sequence[Example], pool: Iterable[Example], embedder: Embedder, count: int
) -> Iterator[Example]:
    """Each example over the `count` passages that score highest, its gold ones among them."""
    documents = list(dict.fromkeys(d for each in pool for d in each.documents))
    vectors = _embedded([embedded_text(d) for d in documents], embedder)
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        queries = embedder.embed_queries([each.question for each in batch])
        best = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :count]
        for example, places in zip(batch, best, strict=True):
            gold = gold_of(example)
            hits = [documents[i] for i in places]
            missing = [d for d in gold if d not in hits]
            chosen = [*hits[: count - len(missing)], *missing]
            yield example.with_documents(chosen, [i for i, d in enumerate(chosen) if d in gold])


def _embedded(texts: Sequence[str], embedder: Embedder) -> Any:
    """float32 [texts, dimension]; texts of like length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.empty((len(texts), embedder.dimension), np.float32)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        found[places] = embedder.embed([texts[i] for i in places])
    return found


def write(path: Path, examples: Iterable[Example], *, sentences: bool) -> None:
    """The rows as lost-in-the-middle's: question, answers, ctxs with title, text and isgold."""
    rng = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for example in examples:
            question = example.question
            if sentences and rng.random() < 0.5:
                question = question[:1].upper() + question[1:].rstrip("?") + "?"
            ctxs = [
                {"title": d.title, "text": d.text, "isgold": i in example.gold}
                for i, d in enumerate(example.documents)
            ]
            row = {"question": question, "answers": list(example.answers), "ctxs": ctxs}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(given: Sequence[str] | None = None) -> int:
    """The command in the module's text."""
    arguments = _parse(given)
    try:
        examples = read_rows(arguments.data, arguments.without)
        pool = [*examples, *(read_rows(arguments.pool, ()) if arguments.pool else ())]
        embedder = load_embedder(arguments.embedder, device=arguments.device)
        found = retrieved(examples, pool, embedder, arguments.documents)
        write(arguments.out, found, sentences=arguments.sentences)
        if arguments.plain is not None:
            plain = (
                each.with_documents(gold := gold_of(each), range(len(gold))) for each in examples
            )
            write(arguments.plain, plain, sentences=arguments.sentences)
    except KVLinkError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _parse(given: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", action="append", required=True, metavar="FILE[:FIRST-LAST]")
    options.add_argument("--without", action="append", default=[], metavar="FILE:LINE,LINE")
    options.add_argument("--pool", action="append", metavar="FILE", help="more passages")
    options.add_argument("--embedder", required=True, help="a directory, hub id or pair")
    options.add_argument("--documents", type=int, default=24, help="passages a question (24)")
    options.add_argument("--sentences", action="store_true", help="half the questions with a mark")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--plain", type=Path, help="the same rows with gold passages alone")
    options.add_argument("--device", default="auto")
    return options.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
