"""Questions a second, and the first token's wait, under several askers at once.

    python benchmarks/throughput.py --sizes 10x200 --askers 1 2 4 8 --questions 16

So many threads share one model and one store. Each asks new questions over the same passages, in an
order of its own, one after the other, `--new-tokens` tokens each; snapshots are in the page cache.
The wait runs from the question to its first token, what other askers cost included. Every question
must have read all its snapshots. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measuring import Row, finish, load, median, parser, percentile, refuse, show
from shapes import words
from ways import Laid, check

from kvlink_rag import Document, KVLinkModel, Part, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import Reuse

COLUMNS = ("size", "codec", "askers", "questions", "questions_per_s", "ttft_p50_s", "ttft_p95_s")


def main() -> None:
    arguments = parse()
    model = load(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        for size in arguments.sizes:
            rows += measure(model, Path(directory) / size, size, arguments)
    show(rows, COLUMNS)
    finish(arguments, rows)


def measure(
    model: KVLinkModel, directory: Path, size: str, arguments: argparse.Namespace
) -> list[Row]:
    """One row for each number of askers."""
    passages, tokens = (int(n) for n in size.split("x"))
    generator = torch.Generator().manual_seed(passages * tokens)
    documents = [Document(words(tokens, generator)) for _ in range(passages)]
    laid = Laid(model, directory, documents, arguments.codec)
    reuse = laid.at("cached")
    check(model, model.prompt(documents, words(12, generator)), reuse)
    rows = []
    for askers in arguments.askers:
        prompts = [
            model.prompt(shuffled(documents, number), words(12, generator))
            for number in range(arguments.questions)
        ]
        start = time.perf_counter()
        with ThreadPoolExecutor(askers) as pool:
            waits = list(pool.map(lambda p: ask(model, p, reuse, arguments.new_tokens), prompts))
        rows.append(
            {
                "model": model.name,
                "size": size,
                "codec": arguments.codec,
                "askers": askers,
                "questions": len(prompts),
                "questions_per_s": round(len(prompts) / (time.perf_counter() - start), 4),
                "ttft_p50_s": round(median(waits), 4),
                "ttft_p95_s": round(percentile(waits, 0.95), 4),
            }
        )
    laid.close()
    return rows


def ask(model: KVLinkModel, prompt: list[Part], reuse: Reuse, new_tokens: int) -> float:
    """Seconds to the first token of one whole answer."""
    trace = Trace()
    for _ in model.stream(prompt, max_new_tokens=new_tokens, reuse=reuse, trace=trace):
        pass
    if trace.snapshots_encoded or not trace.snapshots_found:
        refuse(f"a snapshot was encoded, not read ({trace})")
    return trace.first_token_ms / 1e3


def shuffled(documents: list[Document], seed: int) -> list[Document]:
    """In another order, so that no asker finds its link tokens kept."""
    return random.Random(seed).sample(documents, len(documents))


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", default=["10x200"], metavar="PxT")
    options.add_argument("--codec", default=EXACT, choices=CODECS)
    options.add_argument("--askers", nargs="+", type=int, default=[1, 2, 4, 8])
    options.add_argument("--questions", type=int, default=16, help="for each number of askers")
    options.add_argument("--new-tokens", type=int, default=8)
    return options.parse_args()


if __name__ == "__main__":
    main()
