"""Answers and tokens a second, and the first token's wait, under several askers at once.

    python benchmarks/throughput.py --sizes 10x200 --askers 1 2 4 8 --questions 16
    python benchmarks/throughput.py --askers 1 8 --new-tokens 32 --load 0.7

So many threads share one model and one store. Each asks new questions over the same passages, in an
order of its own, one after the other, `--new-tokens` tokens each; snapshots are in the page cache.
The wait runs from the question to its first token, what other askers cost included. With `--load`,
then also questions that arrive at random (exponential pauses, a fixed seed) at that share of the
last rate of answers. Every question must have read all its snapshots. The last line is one JSON
object.
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

COLUMNS = ("size", "codec", "askers", "questions", "answers_per_s", "tokens_per_s", "over_one",
           "ttft_p50_s", "ttft_p95_s", "ttft_p95_over_one")  # fmt: skip


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
    """One row for each number of askers, and one of questions that arrive at random."""
    passages, tokens = (int(n) for n in size.split("x"))
    generator = torch.Generator().manual_seed(passages * tokens)
    documents = [
        Document(words(tokens, generator, model.tokenizer.encode)) for _ in range(passages)
    ]
    laid = Laid(model, directory, documents, arguments.codec)
    reuse = laid.at("cached")
    check(model, model.prompt(documents, words(12, generator, model.tokenizer.encode)), reuse)
    rows = []
    for askers in arguments.askers:
        prompts = [
            model.prompt(shuffled(documents, number), words(12, generator, model.tokenizer.encode))
            for number in range(arguments.questions)
        ]
        start = time.perf_counter()
        with ThreadPoolExecutor(askers) as pool:
            traces = list(pool.map(lambda p: ask(model, p, reuse, arguments.new_tokens), prompts))
        rows.append(row(f"{askers}", traces, time.perf_counter() - start))
    if arguments.load:
        rate = arguments.load * rows[-1]["answers_per_s"]
        rows.append(arriving(model, prompts, reuse, arguments.new_tokens, rate))
    for each in rows:
        each |= {"model": model.name, "size": size, "codec": arguments.codec}
        each["over_one"] = round(each["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
        each["ttft_p95_over_one"] = round(each["ttft_p95_s"] / rows[0]["ttft_p50_s"], 3)
    laid.close()
    return rows


def arriving(
    model: KVLinkModel, prompts: list[list[Part]], reuse: Reuse, new_tokens: int, rate: float
) -> Row:
    """Questions at random times, `rate` a second on average, each asked as it arrives."""
    pauses = random.Random(0)
    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = []
        for prompt in prompts:
            time.sleep(pauses.expovariate(rate))
            answers.append(pool.submit(ask, model, prompt, reuse, new_tokens))
        traces = [answer.result() for answer in answers]
    return row(f"{rate:.3g} a second", traces, time.perf_counter() - start)


def row(askers: str, traces: list[Trace], seconds: float) -> Row:
    """What came of some questions in `seconds`."""
    waits = [trace.first_token_ms / 1e3 for trace in traces]
    tokens = sum(trace.generated_tokens for trace in traces)
    return {
        "askers": askers,
        "questions": len(traces),
        "answers_per_s": round(len(traces) / seconds, 4),
        "tokens_per_s": round(tokens / seconds, 3),
        "ttft_p50_s": round(median(waits), 4),
        "ttft_p95_s": round(percentile(waits, 0.95), 4),
    }


def ask(model: KVLinkModel, prompt: list[Part], reuse: Reuse, new_tokens: int) -> Trace:
    """What one whole answer cost."""
    trace = Trace()
    for _ in model.stream(prompt, max_new_tokens=new_tokens, reuse=reuse, trace=trace):
        pass
    if trace.snapshots_encoded or not trace.snapshots_found:
        refuse(f"a snapshot was encoded, not read ({trace})")
    return trace


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
    options.add_argument("--load", type=float, help="share of the last rate at which others arrive")
    return options.parse_args()


if __name__ == "__main__":
    main()
