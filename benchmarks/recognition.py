"""Recognition of passages in a prompt: time, and the memory of the table of known texts.

    python benchmarks/recognition.py --passages 100000 --characters 20000 --rounds 50

Fills a catalog with passages of 120 random words each and puts as many of them as fit, and some
text of no passage, into a prompt. Four kinds of prompt are timed:
    chain     passages joined by blank lines, then a question: what a stuffing chain writes
    text      no known passage
    one_head  all passages of the collection begin with the same 90 characters
    changed   as chain, right after a batch of 256 passages was added by another connection
Each round is a new prompt. The recogniser alone is timed (version check, table look-up, documents
read from the catalog and compared), not the answer. `table_bytes` is what the arrays hold,
`peak_bytes` the most Python memory while the table was made. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shapes import machine

from kvlink_rag import Document, Passage
from kvlink_rag.collection.catalog import Catalog, Record
from kvlink_rag.prompt.recognition import Recogniser

WORDS = 120
BATCH = 256
HEADER = "Internal report of the harbour company of Orvale, confidential, not for circulation: no. "


class NoTokenizer:
    """Texts of `WORDS` words are long enough without asking a tokenizer."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Never called here."""
        raise SystemExit("no figures: a passage was taken for a short one")


def main() -> None:
    arguments = parse()
    generator = random.Random(7)
    words = ["".join(generator.choices("abcdefghiklmnoprstuvw", k=n % 9 + 2)) for n in range(4000)]
    rows = []
    for header in ("", HEADER):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
            path = Path(directory) / "catalog.sqlite"
            with Catalog.open(path, create=True) as catalog:
                rows += measure(catalog, header, words, generator, arguments)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    print(json.dumps({"machine": machine(), "rounds": arguments.rounds, "rows": rows}))


def measure(
    catalog: Catalog,
    header: str,
    words: Sequence[str],
    generator: random.Random,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One collection: the table, then each kind of prompt."""

    def passage() -> str:
        return header + " ".join(generator.choices(words, k=WORDS)) + "."

    def batch() -> list[str]:
        texts = [passage() for _ in range(BATCH)]
        catalog.upsert([Record(Document(text)) for text in texts])
        return texts

    known = [text for _ in range(arguments.passages // BATCH + 1) for text in batch()]
    recogniser = Recogniser(catalog, NoTokenizer())
    tracemalloc.start()
    start = time.perf_counter()
    table = recogniser.refresh()
    made = time.perf_counter() - start
    facts = {
        "passages": len(table.heads),
        "table_made_s": made,
        "table_bytes": table.nbytes,
        "peak_bytes": tracemalloc.get_traced_memory()[1],
    }
    tracemalloc.stop()

    def chain() -> tuple[str, int]:
        found = [generator.choice(known)]
        while sum(map(len, found)) + len(found[0]) < arguments.characters:
            found.append(generator.choice(known))
        body = "\n\n".join(found)
        rest = filler(arguments.characters - len(body), generator, words)
        return f"{rest}\n\n{body}\n\nQuestion: what?\nAnswer:", len(found)

    def text() -> tuple[str, int]:
        return filler(arguments.characters, generator, words), 0

    def changed() -> tuple[str, int]:
        batch()
        return chain()

    kinds: dict[str, Callable[[], tuple[str, int]]]
    kinds = {"one_head": chain} if header else {"chain": chain, "text": text, "changed": changed}
    return [
        {"kind": kind, **facts, **summary(timed(recogniser, make, arguments.rounds))}
        for kind, make in kinds.items()
    ]


def timed(
    recogniser: Recogniser, make: Callable[[], tuple[str, int]], rounds: int
) -> Iterator[tuple[float, float, int, int]]:
    """Wall and processor seconds, characters and passages of each round; the first is left out."""
    for number in range(rounds + 1):
        prompt, expected = make()
        start, processor = time.perf_counter(), time.process_time()
        parts = recogniser.recognise(prompt)
        took = time.perf_counter() - start, time.process_time() - processor
        found = sum(isinstance(part, Passage) for part in parts)
        if found != expected:
            raise SystemExit(f"no figures: recognised {found} passages, expected {expected}")
        if number:
            yield *took, len(prompt), found


def summary(rounds: Iterator[tuple[float, float, int, int]]) -> dict[str, float]:
    """Medians, and the slowest round."""
    wall, processor, characters, found = (list(column) for column in zip(*rounds, strict=True))
    return {
        "wall_ms": statistics.median(wall) * 1e3,
        "wall_ms_most": max(wall) * 1e3,
        "processor_ms": statistics.median(processor) * 1e3,
        "processor_ms_most": max(processor) * 1e3,
        "characters": statistics.median(characters),
        "recognised": statistics.median(found),
    }


def filler(length: int, generator: random.Random, words: Sequence[str]) -> str:
    """About `length` characters that are no passage."""
    return " ".join(generator.choices(words, k=max(1, length // 7)))[: max(1, length)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--scratch", help="directory for the catalog")
    return parser.parse_args()


if __name__ == "__main__":
    main()
