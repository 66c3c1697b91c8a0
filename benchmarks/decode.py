"""Tokens a second after the first: over a cache from snapshots, and over transformers' own.

    python benchmarks/decode.py --sizes 10x200 --new-tokens 64 --rounds 5

Each round decodes greedily `--new-tokens` tokens of one prompt, one after the other:
    reuse   `PromptRun.step` over the live cache that assembly made
    full    transformers' own forward, a token at a time, over the `DynamicCache` that its full
            prefill of the same token ids made, "sdpa"
Prefill is not part of it. Reuse's tokens are compared with those of the masked full prefill before:
they must be the same up to a near tie. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measuring import Row, finish, load, median, parser, refuse, show
from transformers import DynamicCache
from ways import laid_out

from kvlink_rag import KVLinkModel, Layout, Trace
from kvlink_rag.engine.live_cache import as_argument
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.model.verify import TOLERANCE
from kvlink_rag.snapshots.sources import Reuse

COLUMNS = ("size", "new_tokens", "reuse_tokens_per_s", "full_tokens_per_s", "reuse_over_full")


def main() -> None:
    arguments = parse()
    model = load(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        rows = [measure(model, Path(directory) / size, size, arguments) for size in arguments.sizes]
    show(rows, COLUMNS)
    finish(arguments, rows)


def measure(model: KVLinkModel, directory: Path, size: str, arguments: argparse.Namespace) -> Row:
    """Medians of interleaved rounds."""
    laid, prompt = laid_out(model, directory, size)
    reuse = laid.at("cached")
    layout, new = model.layout(prompt), arguments.new_tokens
    agree(model, layout, reuse, new)
    rounds = [
        (after_reuse(model, layout, reuse, new), after_full(model, layout, new))
        for _ in range(arguments.rounds + 1)
    ][1:]
    laid.close()
    return {
        "model": model.name,
        "size": size,
        "new_tokens": new,
        "reuse_tokens_per_s": round(new / median(r for r, _ in rounds), 3),
        "full_tokens_per_s": round(new / median(f for _, f in rounds), 3),
        "reuse_over_full": round(median(f / r for r, f in rounds), 4),
    }


def agree(model: KVLinkModel, layout: Layout, reuse: Reuse, new: int) -> None:
    """Refuse where reuse and the masked prefill part at anything but a near tie."""
    ours, oracle = (
        PromptRun(model.backbone, layout, Trace(mode=mode), reuse) for mode in ("reuse", "masked")
    )
    logits, expected = ours.start(new), oracle.start(new)
    for number in range(new):
        token = int(expected.argmax())
        if int(logits.argmax()) != token:
            best = expected.topk(2).values
            margin = float((best[0] - best[1]) / expected.abs().max())
            if margin > 2 * TOLERANCE[model.backbone.dtype]:
                refuse(f"token {number} is not the masked prefill's, by a margin of {margin:.2e}")
        logits, expected = ours.step(token), oracle.step(token)


def after_reuse(model: KVLinkModel, layout: Layout, reuse: Reuse, new: int) -> float:
    """Seconds for `new` tokens."""
    run = PromptRun(model.backbone, layout, Trace(), reuse)
    logits = run.start(new)
    model.backbone.synchronize()
    start = time.perf_counter()
    for _ in range(new):
        logits = run.step(int(logits.argmax()))
    model.backbone.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def after_full(model: KVLinkModel, layout: Layout, new: int) -> float:
    """Seconds for `new` tokens of transformers' own."""
    backbone, cache = model.backbone, DynamicCache()
    given = as_argument(cache, backbone.model)
    ours, backbone.config._attn_implementation = backbone.config._attn_implementation, "sdpa"
    try:
        ids = layout.token_ids[None].to(backbone.device)
        output = backbone.model(input_ids=ids, logits_to_keep=1, **given)
        backbone.synchronize()
        start = time.perf_counter()
        for _ in range(new):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = backbone.model(input_ids=token, logits_to_keep=1, **given)
        backbone.synchronize()
        return time.perf_counter() - start
    finally:
        backbone.config._attn_implementation = ours


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", default=["10x200"], metavar="PxT")
    options.add_argument("--new-tokens", type=int, default=64)
    return options.parse_args()


if __name__ == "__main__":
    main()
