"""Searching vectors: time to build, save and load, memory, latency, recall of the nearest ten.

    python benchmarks/retrieval.py --counts 10000 100000 1000000 --dimension 768

Vectors lie around random centres, as those of texts do, and so do the queries: uniform ones have no
near neighbours, and nothing could tell them apart. Each number of vectors is searched exactly, and
in lists. Recall@10 is the share of the ten largest inner
products, computed here with numpy, that the index names. Memory is what the process grew by. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from measuring import Row, finish, median, percentile, show

from kvlink_rag.arguments import SEARCHES
from kvlink_rag.retrieval.vector_index import VectorIndex

NEAREST = 10
COLUMNS = ("count", "dimension", "search", "build_s", "save_s", "load_s", "memory_mb",
           "search_p50_ms", "search_p95_ms", "recall_at_10")  # fmt: skip


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        for count in arguments.counts:
            for search in arguments.search:
                rows.append(measure(count, search, Path(directory) / "index", arguments))
                show(rows[-1:], COLUMNS)
    finish(arguments, rows)


def measure(count: int, search: str, path: Path, arguments: argparse.Namespace) -> Row:
    """One number of vectors, searched in one way."""
    vectors, queries = around_centres(
        count, arguments.dimension, arguments.queries, arguments.spread
    )
    before = resident()
    index = VectorIndex(arguments.dimension, search)
    build = timed(lambda: index.add(np.arange(count), vectors))
    grown = resident() - before
    save = timed(lambda: index.save(path, 1))
    del index
    load = timed(lambda: VectorIndex.load(path, search=search))
    index, _ = VectorIndex.load(path, search=search)
    index.search(queries[0], NEAREST)
    taken, recalls = [], []
    for query in queries:
        start = time.perf_counter()
        found = index.search(query, NEAREST)
        taken.append(1e3 * (time.perf_counter() - start))
        exact = np.argpartition(-(vectors @ query), NEAREST - 1)[:NEAREST]
        recalls.append(len({id for id, _ in found} & set(exact.tolist())) / NEAREST)
    return {
        "count": count,
        "search": search,
        "dimension": arguments.dimension,
        "build_s": round(build, 3),
        "save_s": round(save, 3),
        "load_s": round(load, 3),
        "memory_mb": round(grown / 1e6, 1),
        "search_p50_ms": round(median(taken), 3),
        "search_p95_ms": round(percentile(taken, 0.95), 3),
        "recall_at_10": round(sum(recalls) / len(recalls), 4),
    }


def around_centres(
    count: int, dimension: int, queries: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """float32 unit vectors [count, dimension] around sqrt(count) centres, and queries likewise."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((max(1, int(count**0.5)), dimension), dtype=np.float32)
    rows = np.empty((count + queries, dimension), dtype=np.float32)
    for start in range(0, len(rows), 65536):
        part = rows[start : start + 65536]
        part[:] = centres[random.integers(len(centres), size=len(part))]
        part += spread * random.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows[:count], rows[count:]


def timed(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--counts", nargs="+", type=int, default=[10_000, 100_000])
    options.add_argument("--search", nargs="+", default=["exact", "ivf"], choices=SEARCHES)
    options.add_argument("--spread", type=float, default=0.7, help="around a centre; 1: as wide")
    options.add_argument("--dimension", type=int, default=768)
    options.add_argument("--queries", type=int, default=100)
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--scratch", help="folder for the index file")
    return options.parse_args()


if __name__ == "__main__":
    main()
