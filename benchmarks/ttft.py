"""Time to first token: reuse of stored snapshots against a full prefill of the same prompt.

    python benchmarks/ttft.py --shape llama-3.2-1b --sizes 10x200 10x500 --rounds 9

Each round asks a new question of 12 tokens over the same passages and times, one after the other:
    reuse   first `next()` of the stream: layout, snapshots read from the store (page cache warm),
            assembly with position re-encoding, prefill of link tokens and question, sampling
    full    transformers' own forward over the whole prompt, causal attention (no mask in memory),
            logits of the last token only
    floor   transformers' own forward of reuse's computed tokens over a cache that stands in memory
            (`DynamicCache`, attention implementation "sdpa", the mask given)
Retrieval is not part of it. The system prompt's keys and values are kept between questions, as the
library does by default; link tokens, mem_end, question and assistant header are computed every
time. Before any figure is printed, reuse is compared with the masked full
prefill of the same prompt, and refused where they differ. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import AFTER_WORDS, SHAPES, machine, random_model, words
from transformers import DynamicCache

from kvlink_rag import Document, KVLinkModel, Layout, Part, Trace
from kvlink_rag.answering import PromptRun, Reuse
from kvlink_rag.encoding import encode_many
from kvlink_rag.layout import visibility
from kvlink_rag.prefix import PrefixCache
from kvlink_rag.store import SnapshotStore
from kvlink_rag.stored import StoredSnapshots

QUESTION_TOKENS = 12


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = random_model(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        for size in arguments.sizes:
            passages, tokens = (int(n) for n in size.split("x"))
            rows.append(measure(model, directory, passages, tokens, arguments))
            show(rows[-1])
    print(json.dumps({"machine": machine(), "rounds": arguments.rounds, "rows": rows}))


def measure(
    model: KVLinkModel, directory: str, passages: int, tokens: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Medians of interleaved rounds for one prompt size."""
    generator = torch.Generator().manual_seed(passages * tokens)
    documents = [Document(words(tokens, generator)) for _ in range(passages)]
    with SnapshotStore(f"{directory}/{passages}x{tokens}") as store:
        source = StoredSnapshots(store, model.backbone)
        fill(model, store, source, documents)
        questions = [words(QUESTION_TOKENS, generator) for _ in range(arguments.rounds + 1)]
        prompts = [model.prompt(documents, question) for question in questions]
        check(model, prompts[0], system_prompt_kept(model, source))
        rounds = [
            one_round(model, prompt, system_prompt_kept(model, source)) for prompt in prompts[1:]
        ]
    return summary(model, passages, tokens, rounds)


def fill(
    model: KVLinkModel, store: SnapshotStore, source: StoredSnapshots, documents: list[Document]
) -> None:
    """Encode and store every passage, then read each once, so that the page cache is warm."""
    ids = [model.passage_tokens(document) for document in documents]
    for index, snapshot in encode_many(model.backbone, ids):
        store.put(source.key(ids[index]), snapshot)
    source.fetch(ids, Trace())


def system_prompt_kept(model: KVLinkModel, source: StoredSnapshots) -> Reuse:
    """What an earlier question over other passages leaves: the system prompt's run, no more.

    With the same passages in the same order their link tokens would be kept too: exact, and faster
    than what is timed here.
    """
    reuse = Reuse(source, PrefixCache())
    model.prefill(model.prompt([Document("w1 w2 w3")], "w4"), reuse=reuse)
    return reuse


def check(model: KVLinkModel, prompt: list[Part], reuse: Reuse) -> None:
    """Warm up, and refuse to time a path that does not give the masked prefill's answer."""
    verdict = model.verify(prompt, reuse=reuse)
    if not verdict.holds:
        raise SystemExit(f"no figures: {verdict.message}")
    print(f"# {verdict.message}")
    first_piece(model, prompt, reuse)


def one_round(model: KVLinkModel, prompt: list[Part], reuse: Reuse) -> dict[str, float]:
    """Seconds of each way to the first token of one new question, and reuse's stages."""
    laid = model.layout(prompt)
    bare = floor(model, laid, reuse)  # first: the stream keeps runs that would spare it work
    trace, took = first_piece(model, prompt, reuse)
    passages, links = trace.passages, model.spec.links_per_passage
    expected = passages * links + 1 + QUESTION_TOKENS + AFTER_WORDS
    if trace.snapshots_found != passages or trace.computed_tokens != expected:
        raise SystemExit(f"no figures: reuse did not take the path it claims ({trace})")
    row = {"ttft_reuse_s": took, "ttft_full_s": full_prefill(model, laid)}
    row["ttft_floor_s"] = bare
    stages = ("layout", "read", "assembly", "prefill")
    row |= {f"{stage}_ms": getattr(trace, f"{stage}_ms") for stage in stages}
    return row | {"computed_tokens": trace.computed_tokens, "reused_tokens": trace.reused_tokens}


def first_piece(model: KVLinkModel, prompt: list[Part], reuse: Reuse) -> tuple[Trace, float]:
    """Seconds to the first token through the public stream."""
    stream = model.stream(prompt, max_new_tokens=1, reuse=reuse)
    for _ in stream:
        pass
    return stream.trace, stream.trace.first_token_ms / 1e3


def full_prefill(model: KVLinkModel, laid: Layout) -> float:
    """Seconds of transformers' own forward over the whole prompt."""
    ids = laid.token_ids[None].to(model.backbone.device)
    hf = model.backbone.model
    return timed(model, lambda: hf(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax())


def floor(model: KVLinkModel, laid: Layout, reuse: Reuse) -> float:
    """Seconds of transformers' own forward of reuse's computed tokens over a cache in place."""
    backbone = model.backbone
    run = PromptRun(backbone, laid, Trace(), reuse)
    assembled = run.assemble(room=0)
    cache = DynamicCache()
    standing = len(assembled.cache.positions)
    for number, layer in enumerate(assembled.cache.layers):
        keys, values = layer.keys[:, :, :standing], layer.values[:, :, :standing]
        cache.update(keys.clone(), values.clone(), number)
    left = assembled.computed
    at, seg = laid.positions[left], laid.segments[left]
    mask = visibility(
        at,
        seg,
        torch.cat([assembled.cache.positions.cpu(), at]),
        torch.cat([assembled.cache.segments.cpu(), seg]),
    )
    device = backbone.device
    inputs = {
        "input_ids": laid.token_ids[left][None].to(device),
        "position_ids": at[None].to(device),
        "attention_mask": mask[None, None].to(device),
    }
    ours = backbone.config._attn_implementation
    backbone.config._attn_implementation = "sdpa"
    try:
        return timed(
            model,
            lambda: backbone.model(
                past_key_values=cache, logits_to_keep=1, **inputs
            ).logits.argmax(),
        )
    finally:
        backbone.config._attn_implementation = ours


def timed(model: KVLinkModel, call: Callable[[], torch.Tensor]) -> float:
    """Seconds of `call`, device included."""
    with torch.inference_mode():
        model.backbone.synchronize()
        start = time.perf_counter()
        call().item()
        return time.perf_counter() - start


def summary(
    model: KVLinkModel, passages: int, tokens: int, rounds: list[dict[str, float]]
) -> dict[str, Any]:
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    full_ratio = statistics.median(r["ttft_reuse_s"] / r["ttft_full_s"] for r in rounds)
    floor_ratio = statistics.median(r["ttft_reuse_s"] / r["ttft_floor_s"] for r in rounds)
    return {
        "model": model.name,
        "passages": passages,
        "tokens_per_passage": tokens,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "source": "disk, page cache warm",
        **{name: round(value, 4) for name, value in medians.items()},
        "reuse_over_full": round(full_ratio, 4),
        "reuse_over_floor": round(floor_ratio, 4),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['passages']:3d} x {row['tokens_per_passage']:4d}  reuse {row['ttft_reuse_s']:.3f} s"
        f"  full {row['ttft_full_s']:.3f} s  floor {row['ttft_floor_s']:.3f} s"
        f"  reuse/full {row['reuse_over_full']:.2%}  reuse/floor {row['reuse_over_floor']:.3f}"
        f"  read {row['read_ms']:.0f} ms  assembly {row['assembly_ms']:.0f} ms",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--sizes", nargs="+", default=["10x200", "10x500"], metavar="PxT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", default=None, help="folder for the snapshots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
