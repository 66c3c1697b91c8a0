"""Encoding: snapshot tokens a second against a plain batched prefill; memory over many passages.

    python benchmarks/encode.py --shape llama-3.2-1b --passages 20 --tokens 200 --rounds 5

Each round runs, one after the other, over the same passages in the same batches:
    encode  `PassageEncoder.many`, `SnapshotStore.put`: snapshots on disk (cached), checksums too
    plain   transformers' own forward with its own cache, nothing kept
Then a collection takes `--many` passages through `KVLinkRAG.add` with a small random model, and
the process's memory is read after each fifth of them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from measuring import dtype_of
from shapes import SHAPES, machine, random_model, words
from transformers import DynamicCache

from kvlink_rag import Document, KVLinkModel, KVLinkRAG
from kvlink_rag.engine.backbone import pad_batch
from kvlink_rag.engine.live_cache import as_argument
from kvlink_rag.snapshots.encode import TOKENS_A_BATCH, batches
from kvlink_rag.snapshots.sources import StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        speed = throughput(arguments, directory)
        print(
            f"encode {speed['encode_tokens_per_s']:.0f} tokens/s, plain prefill "
            f"{speed['plain_tokens_per_s']:.0f} tokens/s, ratio {speed['encode_over_plain']:.3f}",
            flush=True,
        )
        memory = memory_over(arguments.many, directory)
        print("memory after each fifth, MiB:", memory["resident_mib"], flush=True)
    print(json.dumps({"machine": machine(), "rows": [speed], "memory": memory}))


def throughput(arguments: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Medians of interleaved rounds, in tokens a second."""
    model = random_model(arguments.shape, dtype_of(arguments), arguments.device)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(
        arguments.tokens // 2, arguments.tokens * 3 // 2, (arguments.passages,), generator=generator
    ).tolist()
    passages = [model.passage_tokens(Document(words(n, generator))) for n in lengths]
    rounds = []
    for number in range(arguments.rounds + 1):
        with SnapshotStore(f"{directory}/{number}") as store:
            rounds.append((encode(model, store, passages), plain(model, passages)))
    encoded, bare = (statistics.median(r[i] for r in rounds[1:]) for i in (0, 1))
    return {
        "model": model.name,
        "dtype": model.backbone.dtype_name,
        "passages": len(passages),
        "tokens": sum(lengths),
        "encode_tokens_per_s": round(sum(lengths) / encoded, 1),
        "plain_tokens_per_s": round(sum(lengths) / bare, 1),
        "encode_over_plain": round(statistics.median(p / e for e, p in rounds[1:]), 4),
        "bytes_per_token": model.backbone.token_bytes,
    }


def encode(model: KVLinkModel, store: SnapshotStore, passages: list[tuple[int, ...]]) -> float:
    """Seconds from token ids to snapshots in the store."""
    source = StoredSnapshots(store, model.encoder)
    start = time.perf_counter()
    for index, snapshot in model.encoder.many(passages):
        store.put(source.key(passages[index]), snapshot)
    return time.perf_counter() - start


@torch.inference_mode()
def plain(model: KVLinkModel, passages: list[tuple[int, ...]]) -> float:
    """Seconds of transformers' own forward over the same batches."""
    start = time.perf_counter()
    for batch in batches([len(ids) for ids in passages], TOKENS_A_BATCH):
        ids = pad_batch([passages[i] for i in batch]).to(model.backbone.device)
        inner = model.backbone.model.model
        inner(input_ids=ids, use_cache=True, **as_argument(DynamicCache(), inner))
        model.backbone.synchronize()
    return time.perf_counter() - start


class CheapEmbedder:
    """Vectors at no cost: this benchmark is about snapshots."""

    dimension = 8
    fingerprint = "cheap"

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), self.dimension), dtype=np.float32)

    embed_queries = embed


def memory_over(count: int, directory: str) -> dict[str, Any]:
    """Resident memory while a collection takes `count` passages of 100 tokens."""
    model = random_model("tiny", torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    seen = []

    def documents() -> Iterator[Document]:
        for number in range(count):
            if number % (count // 5) == 0 and number:
                seen.append(resident_mib())
            yield Document(words(100, generator), id=str(number))

    with KVLinkRAG.open(f"{directory}/many", model=model, embedder=CheapEmbedder()) as rag:
        report = rag.add(documents())
        seen.append(resident_mib())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"passages": report.added, "resident_mib": seen, "peak_mib": round(peak)}


def resident_mib() -> int:
    """Resident memory of this process that is not shared with files."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = file.read().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") >> 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200, help="mean tokens a passage")
    parser.add_argument("--many", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16, as suits a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", default=None, help="folder for the snapshots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
