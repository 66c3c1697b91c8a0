"""Reading and assembling snapshots: bytes a second against memcpy and the disk's own reading.

    python benchmarks/load.py --sizes 10x200 10x500 --codecs exact int8 --rounds 15

Each round, for each codec: read and assembly of one prompt's passages, as a question has them, from
the page cache and from the cold disk (pages dropped, confirmed with mincore); beside them
    memcpy       a copy within memory of as many bytes as the live cache's passages take
    sequential   the same files read cold, one after the other, into one buffer and nothing else
GB/s are 10**9 bytes a second: of the live cache for assembly and memcpy, of the files for reading.
Assembly is compared with the masked prefill first. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import Row, finish, load, median, parser, read_cold, show
from shapes import words
from ways import Laid, check

from kvlink_rag import Document, KVLinkModel, Part, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import Reuse

COLUMNS = ("size", "codec", "place", "read_ms", "assembly_ms", "both_ms", "memcpy_ms",
           "sequential_ms", "cache_gb_per_s", "memcpy_gb_per_s", "over_memcpy",
           "file_gb_per_s", "disk_gb_per_s")  # fmt: skip


def main() -> None:
    arguments = parse()
    model = load(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        for size in arguments.sizes:
            for codec in arguments.codecs:
                rows += measure(
                    model, Path(directory) / size / codec, size, codec, arguments.rounds
                )
    show(rows, COLUMNS)
    finish(arguments, rows)


def measure(model: KVLinkModel, directory: Path, size: str, codec: str, rounds: int) -> list[Row]:
    """One size and codec, from both places."""
    passages, tokens = (int(n) for n in size.split("x"))
    generator = torch.Generator().manual_seed(passages * tokens)
    documents = [
        Document(words(tokens, generator, model.tokenizer.encode)) for _ in range(passages)
    ]
    prompt = model.prompt(documents, words(12, generator, model.tokenizer.encode))
    directory.parent.mkdir(exist_ok=True)
    laid = Laid(model, directory, documents, codec)
    check(model, prompt, laid.at("cached"))
    cache_bytes = passages * tokens * model.backbone.token_bytes
    found: dict[str, list[Trace]] = {"cached": [], "cold": []}
    copies, reads = [], []
    for _ in range(rounds + 1):
        copies.append(memcpy(cache_bytes))
        reads.append(read_cold(laid.files))
        for place, traces in found.items():
            traces.append(assembled(model, prompt, laid.at(place, system_prompt=False)))
    laid.close()
    copied, read = (median(times[1:]) for times in (copies, reads))
    return [
        {
            "model": model.name,
            "size": size,
            "codec": codec,
            "place": place,
            "file_bytes": laid.nbytes,
            "cache_bytes": cache_bytes,
            **row(traces[1:], laid.nbytes, cache_bytes, copied, read),
        }
        for place, traces in found.items()
    ]


def row(
    traces: Sequence[Trace], file_bytes: int, cache_bytes: int, copied: float, read: float
) -> Row:
    """Medians, and bytes over them."""
    both = median(t.read_ms + t.assembly_ms for t in traces)
    return {
        "read_ms": round(median(t.read_ms for t in traces), 3),
        "assembly_ms": round(median(t.assembly_ms for t in traces), 3),
        "both_ms": round(both, 3),
        "memcpy_ms": round(copied * 1e3, 3),
        "sequential_ms": round(read * 1e3, 3),
        "cache_gb_per_s": round(cache_bytes / both / 1e6, 3),
        "memcpy_gb_per_s": round(cache_bytes / copied / 1e9, 3),
        "over_memcpy": round(both / 1e3 / copied, 3),
        "file_gb_per_s": round(file_bytes / both / 1e6, 3),
        "disk_gb_per_s": round(file_bytes / read / 1e9, 3),
    }


def assembled(model: KVLinkModel, prompt: list[Part], reuse: Reuse) -> Trace:
    """Read and assemble, and no more."""
    trace = Trace()
    PromptRun(model.backbone, model.layout(prompt), trace, reuse).assemble(room=0)
    return trace


def memcpy(size: int) -> float:
    """Seconds to copy `size` bytes into memory just taken, as assembly writes them."""
    source = torch.ones(size, dtype=torch.uint8)
    start = time.perf_counter()
    torch.empty(size, dtype=torch.uint8).copy_(source)
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=15)
    options.add_argument("--sizes", nargs="+", default=["10x200", "10x500"], metavar="PxT")
    options.add_argument("--codecs", nargs="+", default=[EXACT, "int8"], choices=CODECS)
    return options.parse_args()


if __name__ == "__main__":
    main()
