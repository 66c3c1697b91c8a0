"""What an embedder finds: recall of each question's own passage among all passages.

    python benchmarks/recall.py --data nq_open_oracle.jsonl --embedder small --limit 2600

Each line of the data is a question with its gold passage first (`question`, `ctxs` of `title` and
`text`). Equal passages count once, and a passage that ties with the gold one is not before it. Also
without the normalisation that the embedder's files may ask for, to say what it is worth. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measuring import Row, finish, show

from kvlink_rag import Document, load_embedder
from kvlink_rag.retrieval.rounds import embedded_text
from kvlink_rag.retrieval.sentence_embedder import SentenceEmbedder

COLUMNS = ("embedder", "normalised", "questions", "passages", "recall_at_1", "recall_at_5",
           "recall_at_10")  # fmt: skip


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    questions, golds, passages = read(Path(arguments.data), arguments.limit)
    embedder = load_embedder(arguments.embedder, device=arguments.device)
    asked = isinstance(embedder, SentenceEmbedder) and embedder.recipe.normalise
    if asked:
        embedder.recipe = replace(embedder.recipe, normalise=False)
    vectors = embedder.embed([embedded_text(passage) for passage in passages])
    queries = embedder.embed_queries(questions)
    rows = []
    for normalised in [True, False] if asked else [False]:
        if normalised:
            ranks = ranked(unit(queries), unit(vectors), golds)
        else:
            ranks = ranked(queries, vectors, golds)
        facts = {"embedder": arguments.embedder, "normalised": normalised}
        counts = {"questions": len(questions), "passages": len(passages)}
        recalls = {f"recall_at_{k}": round(float((ranks < k).mean()), 4) for k in (1, 5, 10)}
        rows.append({**facts, **counts, **recalls})
    show(rows, COLUMNS)
    finish(arguments, rows)


def read(path: Path, limit: int | None) -> tuple[list[str], np.ndarray, list[Document]]:
    """Questions, the row of each one's gold passage, and the passages."""
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    rows: list[Row] = [json.loads(line) for line in lines]
    golds = [Document(row["ctxs"][0]["text"], row["ctxs"][0]["title"]) for row in rows]
    place: dict[str, int] = {}
    numbers = [place.setdefault(embedded_text(gold), len(place)) for gold in golds]
    passages = dict(zip(numbers, golds, strict=True))
    return [row["question"] for row in rows], np.array(numbers), [*passages.values()]


def ranked(queries: np.ndarray, vectors: np.ndarray, golds: np.ndarray) -> np.ndarray:
    """How many passages come before the gold one of each question."""
    scores = queries @ vectors.T
    own = scores[np.arange(len(scores)), golds]
    return np.asarray((scores > own[:, None]).sum(axis=1))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--data", required=True, help="lines of JSON")
    options.add_argument("--embedder", default="small", help="a pair, a directory or a hub id")
    options.add_argument("--limit", type=int, help="the first lines only")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    return options.parse_args()


if __name__ == "__main__":
    main()
