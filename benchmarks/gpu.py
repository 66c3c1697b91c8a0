"""All figures of a GPU: first token from its memory, from the host's and from files; decoding.

    python benchmarks/gpu.py                     # 1B and 8B shapes, 10 x 100 to 500 tokens, CUDA
    python benchmarks/gpu.py --shapes llama-3.1-8b --sizes 10x500 --rounds 30 --codecs exact int8

For each shape (random weights) and size, each round asks a new question over the same passages and
times, one after the other, up to the first token, sampling included:
    full        transformers' own forward over the whole prompt, "sdpa", causal
    reuse       for each codec and place, with CUDA graphs and with the plain forward. Places:
                gpu (snapshots in the device's memory), pinned (in pinned host memory, copied and
                rotated while the forward begins), cached (files in the page cache: checksum,
                staging buffers, copy)
`copies_ms` is the read and assembly of one more run, waited for, without a forward. Then decoding:
tokens a second with graphs, with the plain forward, and of transformers' own over its own cache.

No figure without proof: reuse is compared with the masked full prefill first, for each codec, place
and forward; each timed run must have found its snapshots where it claims and have taken the forward
it claims. The device is waited for around every time. Without a CUDA device there are no figures;
`--device cpu` goes through the same steps, to test them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from decode import after_full, after_reuse, agree
from measuring import Row, finish, load, median, parser, percentile, refuse, show
from shapes import SHAPES, words
from ttft import bare_forward
from ways import Laid, check, first_token

from kvlink_rag import Document, KVLinkModel, Part, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.compare.baselines import Baselines
from kvlink_rag.engine.workspaces import Workspaces
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.snapshots.device_cache import DeviceMemory
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots

PLACES = ("gpu", "pinned", "cached")
FORWARDS = ("graphs", "plain")
PLENTY = 1 << 40  # bytes of a budget that holds all
WARM_UP = 3  # a shape is recorded when it comes the second time
TARGETS = {("llama-3.1-8b", "10x500", EXACT, "gpu", "graphs"): 10.0,
           ("llama-3.1-8b", "10x500", EXACT, "pinned", "graphs"): 25.0}  # fmt: skip
COLUMNS = ("model", "size", "way", "codec", "place", "forward", "ttft_p50_ms", "ttft_p95_ms",
           "over_full", "target_ms", "layout_ms", "read_ms", "assembly_ms", "prefill_ms",
           "copies_ms", "computed_tokens")  # fmt: skip
DECODE = ("model", "size", "way", "forward", "new_tokens", "tokens_per_s")


def main() -> None:
    arguments = parse()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        refuse("found no CUDA device; run this where torch sees one (--device cpu only tests it)")
    rows: list[Row] = []
    decoding: list[Row] = []
    for shape in [arguments.model] if arguments.model else arguments.shapes:
        arguments.shape = shape
        stamp(f"{shape}: loading")
        model = load(arguments)
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
            for size in arguments.sizes:
                stamp(f"{size}: encoding")
                measured = Size(model, Path(directory) / size, size, arguments)
                stamp(f"{size}: proofs, then first tokens")
                rows += measured.first_tokens()
                stamp(f"{size}: decoding")
                decoding += measured.decoding()
                measured.close()
        del model, measured
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    show(rows, COLUMNS)
    show(decoding, DECODE)
    finish(arguments, rows, decode=decoding)


def stamp(stage: str) -> None:
    """Say what begins, and when; a machine that is lent by the minute is planned by this."""
    print(f"# {time.process_time():.0f} CPU s, {time.strftime('%X')}: {stage}", flush=True)


class Size:
    """All ways on one model and prompt size."""

    def __init__(
        self, model: KVLinkModel, directory: Path, size: str, arguments: argparse.Namespace
    ) -> None:
        passages, tokens = (int(n) for n in size.split("x"))
        generator = torch.Generator().manual_seed(passages * tokens)
        self.model, self.size, self.arguments = model, size, arguments
        self.documents = [
            Document(words(tokens, generator, model.tokenizer.encode)) for _ in range(passages)
        ]
        self.questions = [
            words(12, generator, model.tokenizer.encode) for _ in range(arguments.rounds)
        ]
        self.laid = {c: Laid(model, directory / c, self.documents, c) for c in arguments.codecs}
        self.workspaces = model.backbone.workspaces or Workspaces.of(model.backbone)
        self.memories = {
            (codec, place): DeviceMemory(
                model.backbone.side,
                PLENTY if place == "gpu" else 0,
                PLENTY if place == "pinned" else 0,
            )
            for codec in arguments.codecs
            for place in PLACES
        }

    def close(self) -> None:
        for laid in self.laid.values():
            laid.close()

    def first_tokens(self) -> list[Row]:
        """Check and warm up, then rounds; one row a way."""
        prompts = [self.model.prompt(self.documents, q) for q in self.questions]
        ways = [(c, p, f) for c, p in self.memories for f in FORWARDS]
        for codec, place, forward in ways:
            with self.taking(forward):
                check(self.model, prompts[0], self.reuse(codec, place))
                for _ in range(WARM_UP):
                    self.once(codec, place, forward, prompts[0], claim=False)
        bare_forward(self.model, Baselines(self.model).layout(prompts[0]))
        full: list[float] = []
        traces: dict[tuple[str, str, str], list[Trace]] = {way: [] for way in ways}
        copies: dict[tuple[str, str, str], list[float]] = {way: [] for way in ways}
        for prompt in prompts:
            full.append(bare_forward(self.model, Baselines(self.model).layout(prompt))[0] * 1e3)
            for way in ways:
                with self.taking(way[2]):
                    traces[way].append(self.once(*way, prompt))
                    copies[way].append(self.copies(*way[:2], prompt))
        rows = [self.row("full", full, full)]
        for way in ways:
            codec, place, forward = way
            rows.append(
                self.row("reuse", [t.first_token_ms for t in traces[way]], full)
                | {"codec": codec, "place": place, "forward": forward}
                | {"target_ms": TARGETS.get((self.arguments.shape, self.size, *way))}
                | {"computed_tokens": traces[way][0].computed_tokens}
                | {"copies_ms": round(median(copies[way]), 3)}
                | {
                    f"{stage}_ms": round(median(getattr(t, f"{stage}_ms") for t in traces[way]), 3)
                    for stage in ("layout", "read", "assembly", "prefill")
                }
            )
        return rows

    def decoding(self) -> list[Row]:
        """Tokens a second after the first, from the device's memory."""
        new, laid = self.arguments.new_tokens, self.model.layout(self.prompt())
        reuse = self.reuse(self.arguments.codecs[0], "gpu")
        if self.arguments.codecs[0] == EXACT:
            for forward in FORWARDS:
                with self.taking(forward):
                    agree(self.model, laid, reuse, new)
        seconds: dict[str, list[float]] = {name: [] for name in (*FORWARDS, "transformers")}
        for number in range(min(self.arguments.rounds, 5) + 1):
            taken = {}
            for forward in FORWARDS:
                with self.taking(forward):
                    taken[forward] = after_reuse(self.model, laid, reuse, new)
            taken["transformers"] = after_full(self.model, laid, new)
            for name, found in taken.items() if number else ():
                seconds[name].append(found)
        return [
            {
                "model": self.model.name,
                "size": self.size,
                "way": "full" if name == "transformers" else "reuse",
                "forward": name,
                "new_tokens": new,
                "tokens_per_s": round(new / median(found), 2),
            }
            for name, found in seconds.items()
        ]

    def prompt(self) -> list[Part]:
        return self.model.prompt(self.documents, self.questions[0])

    @contextmanager
    def taking(self, forward: str) -> Iterator[None]:
        """With forwards of fixed shape, or the plain one."""
        backbone = self.model.backbone
        kept, backbone.workspaces = (
            backbone.workspaces,
            self.workspaces if forward == "graphs" else None,
        )
        try:
            yield
        finally:
            backbone.workspaces = kept

    def reuse(self, codec: str, place: str) -> Reuse:
        """What reads snapshots from `place`; the system prompt is kept, as a question leaves it."""
        laid, memory = self.laid[codec], self.memories[codec, place]
        source = StoredSnapshots(laid.store, self.model.encoder, codec=codec, memory=memory)
        return replace(laid.at("cached"), snapshots=source, memory=memory)

    def once(
        self, codec: str, place: str, forward: str, prompt: list[Part], *, claim: bool = True
    ) -> Trace:
        """One first token; with `claim` it must have come the way it is said to."""
        reuse, memory = self.reuse(codec, place), self.memories[codec, place]
        before = self.counts(memory)
        trace = first_token(self.model, prompt, reuse)
        on_device, pinned, static = (
            b - a for a, b in zip(before, self.counts(memory), strict=True)
        )
        found = {"gpu": (on_device, 0), "pinned": (0, pinned), "cached": (0, 0)}[place]
        if claim and (on_device, pinned) != found:
            refuse(f"{place}: {on_device} snapshots on the device, {pinned} pinned")
        if claim and place != "cached" and max(found) != trace.snapshots_found:
            refuse(f"{place}: found {max(found)} snapshots there of {trace.snapshots_found}")
        if claim and (static > 0) != (forward == "graphs"):
            why = self.workspaces.graphs.refused if self.workspaces else "this model takes none"
            refuse(f"the forward was not the one of {forward!r} ({why})")
        return trace

    def counts(self, memory: DeviceMemory) -> tuple[int, int, int]:
        """Snapshots found on the device and pinned; graphs replayed (on a CPU workspaces taken)."""
        spaces = self.workspaces
        static = 0
        if spaces is not None:
            static = spaces.graphs.replays if spaces.graphs.record else spaces.taken
        return memory.on_device.hits, memory.pinned.hits, static

    def copies(self, codec: str, place: str, prompt: list[Part]) -> float:
        """Milliseconds to read and assemble, waited for."""
        run = PromptRun(
            self.model.backbone, self.model.layout(prompt), Trace(), self.reuse(codec, place)
        )
        self.model.backbone.synchronize()
        start = time.perf_counter()
        run.assemble(room=0)
        self.model.backbone.synchronize()
        return (time.perf_counter() - start) * 1e3

    def row(self, way: str, taken: list[float], full: list[float]) -> Row:
        return {
            "model": self.model.name,
            "size": self.size,
            "way": way,
            "dtype": self.model.backbone.dtype_name,
            "ttft_p50_ms": round(median(taken), 3),
            "ttft_p95_ms": round(percentile(taken, 0.95), 3),
            "over_full": round(median(a / b for a, b in zip(taken, full, strict=True)), 4),
        }


def parse() -> argparse.Namespace:
    options = parser(__doc__, device="cuda", rounds=15)
    sizes = [f"10x{n}" for n in (100, 200, 300, 400, 500)]
    options.add_argument("--shapes", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"],
                         choices=sorted(SHAPES))  # fmt: skip
    options.add_argument("--sizes", nargs="+", default=sizes, metavar="PxT")
    options.add_argument("--codecs", nargs="+", default=[EXACT], choices=CODECS)
    options.add_argument("--new-tokens", type=int, default=64)
    return options.parse_args()


if __name__ == "__main__":
    main()
