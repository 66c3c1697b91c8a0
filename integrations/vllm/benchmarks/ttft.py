"""Time to first token in vLLM: handed over by kvlink_rag, and vLLM's own prefill of the prompt.

    OMP_NUM_THREADS=1 python benchmarks/ttft.py --passages 8 --words 100 --rounds 5

On the CPU, in float32, over the pair `small`. Of vLLM's own: cold (nothing of the prompt in its
prefix cache), and warm (the same passages in the same order just before, another question). Prints
JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm_kvlink import Handover, export
from vllm_kvlink.handover import KEY

from kvlink_rag import Document, KVLinkRAG

WORDS = [
    "the",
    "harbour",
    "of",
    "this",
    "town",
    "was",
    "built",
    "by",
    "engineers",
    "and",
    "its",
    "lighthouse",
    "has",
    "old",
    "lamps",
]


def passage(number: int, words: int) -> Document:
    text = " ".join(WORDS[(number + i * (number + 3)) % len(WORDS)] for i in range(words))
    return Document(f"Number {number}: {text}.", f"Town {number}", f"town-{number}")


def start(root: Path, rag: KVLinkRAG) -> tuple[Any, int]:
    from vllm import LLM

    vocabulary = export(rag.model, root / "served")
    llm = LLM(
        str(root / "served"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=2,
        kv_transfer_config={
            "kv_connector": "KVLinkConnector",
            "kv_connector_module_path": "vllm_kvlink.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"collection": str(rag.directory), "device": "cpu"},
        },
    )
    return llm, vocabulary


def first_token(llm: Any, ids: list[int], salt: str, layout: Handover | None) -> float:
    """Milliseconds from the request to one token."""
    from vllm import SamplingParams

    extra = None if layout is None else {"kv_transfer_params": {KEY: layout.to_json()}}
    sampling = SamplingParams(temperature=0, max_tokens=1, extra_args=extra)
    begun = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids, "cache_salt": salt}], [sampling], use_tqdm=False)
    return (time.perf_counter() - begun) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    documents = [passage(number, asked.words) for number in range(asked.passages)]
    found: dict[str, list[float]] = {"handed_over": [], "vllm_cold": [], "vllm_warm": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with KVLinkRAG.open(root / "collection", model="small", dtype="float32") as rag:
            rag.register(documents)
            llm, vocabulary = start(root, rag)
            for number in range(asked.rounds + 1):  # the first warms up
                parts = rag.model.prompt(documents, f"Which town has {number} lamps?")
                layout = Handover.of(rag.model.layout(parts))
                ids = layout.placeholders(vocabulary)
                times = {
                    "handed_over": first_token(llm, ids, layout.salt, layout),
                    "vllm_cold": first_token(llm, ids, f"cold {number}", None),
                    "vllm_warm": first_token(llm, ids, "warm", None),
                }
                for kind, milliseconds in times.items() if number else ():
                    found[kind].append(milliseconds)
    medians = {kind: round(statistics.median(times), 1) for kind, times in found.items()}
    print(json.dumps({"tokens": len(ids), **medians}))


if __name__ == "__main__":
    main()
