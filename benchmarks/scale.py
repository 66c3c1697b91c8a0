"""A large collection on one machine: opening, the first search, searches, memory, files a folder.

    python benchmarks/scale.py --passages 100000 --dimension 768
    python benchmarks/scale.py --passages 100000 --dimension 64 --snapshots

The catalog is filled with passages of `--words` words and random unit vectors, without a language
model; with `--snapshots` each passage gets a snapshot of one token in the store too. Then the
collection is closed and opened anew. open: `KVLinkRAG.open` and the index in memory; a search is
`search_vector` (index, then documents from the catalog), k = 10. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import torch
from measuring import Row, finish, median, percentile, refuse, show
from retrieval import resident

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.arguments import SEARCHES
from kvlink_rag.collection.catalog import Record
from kvlink_rag.collection.opening import SNAPSHOTS
from kvlink_rag.snapshots.file_format import snapshot_key
from kvlink_rag.snapshots.snapshot import Snapshot

BATCH, NEAREST = 4096, 10
COLUMNS = ("passages", "dimension", "search", "fill_s", "open_s", "first_search_ms",
           "search_p50_ms", "search_p95_ms", "memory_mb", "most_files_in_a_folder",
           "bytes")  # fmt: skip


class GivenVectors:
    """An embedder that is never asked: vectors are given."""

    def __init__(self, dimension: int) -> None:
        self.dimension, self.fingerprint = dimension, f"given {dimension}"

    def embed(self, texts: object) -> np.ndarray:
        raise RuntimeError("this benchmark gives its vectors")

    embed_queries = embed


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        row = measure(Path(directory) / "collection", arguments)
    show([row], COLUMNS)
    finish(arguments, [row])


def measure(directory: Path, arguments: argparse.Namespace) -> Row:
    """Fill, close, open, search."""
    embedder = GivenVectors(arguments.dimension)
    filled = fill(directory, embedder, arguments)  # what it held is gone when it returns
    before, start = resident(), time.perf_counter()
    with KVLinkRAG.open(directory, embedder=embedder) as rag:
        held = len(rag.index)
        opened = time.perf_counter() - start
        exact = rag.index.is_exact
        if held != arguments.passages:
            refuse(f"the index holds {held} vectors of {arguments.passages}")
        taken = [search(rag, arguments.dimension, seed) for seed in range(arguments.queries)]
        memory = resident() - before
    return {
        "passages": arguments.passages,
        "dimension": arguments.dimension,
        "search": "exact" if exact else "ivf",
        "fill_s": round(filled, 2),
        "open_s": round(opened, 3),
        "first_search_ms": round(taken[0], 3),
        "search_p50_ms": round(median(taken[1:]), 3),
        "search_p95_ms": round(percentile(taken[1:], 0.95), 3),
        "memory_mb": round(memory / 1e6, 1),
        "most_files_in_a_folder": most_files(directory / SNAPSHOTS),
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }


def fill(directory: Path, embedder: GivenVectors, arguments: argparse.Namespace) -> float:
    """Seconds to make the collection."""
    start = time.perf_counter()
    with KVLinkRAG.open(directory, embedder=embedder, search=arguments.search) as rag:
        rag.embedder  # noqa: B018 (from here on the collection knows the dimension)
        take(rag, arguments)
        rag.save_index()
    return time.perf_counter() - start


def take(rag: KVLinkRAG, arguments: argparse.Namespace) -> None:
    """Passages with vectors, and snapshots where asked for."""
    passages = records(arguments)
    while batch := list(islice(passages, BATCH)):
        rag.catalog.upsert(batch)
        for record in batch if arguments.snapshots else ():
            number = int(record.document.id or 0)
            states = torch.full((1, 1, 1, 2), float(number))
            snapshot = Snapshot(states, states, torch.tensor([number]))
            rag.store.put(str(record.snapshot_key), snapshot)
    rag.parts.index.current()


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    words = [f"word{n}" for n in range(5000)]
    rng, vectors = random.Random(0), np.random.default_rng(0)
    for number in range(arguments.passages):
        text = " ".join(rng.choices(words, k=arguments.words))
        key = snapshot_key("scale", [number], dtype=torch.float32) if arguments.snapshots else None
        yield Record(
            Document(text, id=str(number)),
            snapshot_key=key,
            tokens=1 if key else None,
            embedding=unit(vectors, arguments.dimension),
        )


def unit(generator: np.random.Generator, dimension: int) -> np.ndarray:
    vector = generator.standard_normal(dimension, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def search(rag: KVLinkRAG, dimension: int, seed: int) -> float:
    """Milliseconds of one search."""
    query = unit(np.random.default_rng(seed + 1), dimension)
    start = time.perf_counter()
    hits = rag.search_vector(query, NEAREST)
    took = 1e3 * (time.perf_counter() - start)
    if len(hits) != min(NEAREST, len(rag)):
        refuse(f"a search found {len(hits)} documents")
    return took


def most_files(store: Path) -> int:
    """Entries of the fullest folder below the store."""
    counts = Counter(path.parent for path in store.rglob("*"))
    return max(counts.values(), default=0)


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--passages", type=int, default=100_000)
    options.add_argument("--dimension", type=int, default=768)
    options.add_argument("--search", default="auto", choices=SEARCHES)
    options.add_argument("--words", type=int, default=120)
    options.add_argument("--queries", type=int, default=200)
    options.add_argument("--snapshots", action="store_true", help="one in the store for each")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--scratch", help="folder for the collection")
    return options.parse_args()


if __name__ == "__main__":
    main()
