"""Time to first token: reuse of snapshots against full prefill and other ways to reuse.

    python benchmarks/ttft.py --sizes 10x200 10x500 --rounds 15
    python benchmarks/ttft.py --sizes paper passages --random-weights llama-3.2-3b
    python benchmarks/ttft.py --codecs exact int8 --places cold cached ram --ways full cacheblend

Sizes are passages x tokens; "paper" stands for 10x100, 10x200, … 10x500 (KVLink's own), "passages"
for 5x200, 20x200, 40x200.

Each round asks a new question of 12 tokens over the same passages and times, one after the other:
    reuse       for each codec and place: first `next()` of the stream, that is layout, snapshots
                read, assembly with position re-encoding, prefill of link tokens and question,
                sampling. Places: cold (files whose pages were dropped, which mincore confirms),
                cached (files in the page cache), ram (tensors of the process)
    floor       transformers' own forward of reuse's computed tokens over a cache that stands in
                memory (`DynamicCache`, attention implementation "sdpa", the mask given)
and, as `--ways` says, on the prompt without link tokens (`kvlink_rag.compare.baselines`):
    full        transformers' own `generate` of one token over the whole prompt, by its best
                attention (flash-attn on a GPU that has it, else "sdpa": causal, no mask in memory)
    forward     the forward of it alone, logits of the last token only
    prefix      prefix caching: the prompt before it had the same system prompt and the same first
                passage (`--shared-passages`), and then others
    naive       snapshots side by side without link tokens
    cacheblend  naive, 15 % of the passages' tokens computed again
    epic        naive, the first 16 tokens of each passage computed again
Ratios are over_<way>: the median of the rounds' ratios.
Of a cold place also: bytes of the files, the rate at which the disk gives the same files, cold,
read one after the other in the same round, and whether the first token came within 1.3 times the
floor and those bytes at that rate (`target_s`).
The last three read exact snapshots that are in the page cache, and keep the system prompt, as reuse
does. Retrieval is not part of it. Link tokens, mem_end, question and assistant header are computed
every time.

No figure without proof: before each size reuse is compared with the masked full prefill of the
same prompt, for each codec and place; each timed run must have read all its snapshots and computed
as many tokens as it claims; prefix and forward must give full's logits. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Row,
    draw,
    finish,
    load,
    median,
    parser,
    percentile,
    read_cold,
    refuse,
    show,
    timed,
)
from shapes import words
from transformers import DynamicCache
from transformers.utils import is_flash_attn_2_available
from ways import PLACES, Laid, check, first_token

from kvlink_rag import Document, KVLinkModel, Layout, Part, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.compare.baselines import METHODS, Baselines, Started
from kvlink_rag.engine.live_cache import as_argument
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.model.verify import TOLERANCE, compare
from kvlink_rag.prompt.layout import visibility
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import Reuse

QUESTION_TOKENS = 12
COLD_TARGET = 1.3  # of the floor; the bytes over the disk's own rate come on top
WAYS = (*METHODS, "forward")
GROUPS = {
    "paper": [f"10x{tokens}" for tokens in (100, 200, 300, 400, 500)],
    "passages": [f"{passages}x200" for passages in (5, 20, 40)],
}
STAGES = ("layout", "read", "assembly", "prefill")
COLUMNS = ("size", "way", "codec", "place", "ttft_p50_s", "ttft_p95_s", "over_full", "over_floor",
           "read_ms", "assembly_ms", "prefill_ms", "computed_tokens")  # fmt: skip
COLD = ("size", "codec", "snapshot_bytes", "disk_gb_per_s", "ttft_p50_s", "over_floor", "target_s",
        "within_target")  # fmt: skip

Seconds = dict[str, list[float]]  # of each way, one a round


def main() -> None:
    arguments = parse()
    model = load(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        for size in arguments.sizes:
            passages, tokens = (int(n) for n in size.split("x"))
            rows += Size(model, Path(directory) / size, passages, tokens, arguments).measure()
            mine = [row for row in rows if row["size"] == size]
            show(mine, COLUMNS)
            if cold := [row for row in mine if "target_s" in row]:
                show(cold, COLD)
    draw(
        arguments.figure, lambda axes: plot(axes, rows), title=f"Time to first token, {model.name}"
    )
    finish(arguments, rows)


class Size:
    """All ways on one prompt size."""

    def __init__(
        self,
        model: KVLinkModel,
        directory: Path,
        passages: int,
        tokens: int,
        arguments: argparse.Namespace,
    ) -> None:
        generator = torch.Generator().manual_seed(passages * tokens)
        self.model, self.arguments = model, arguments
        self.passages, self.tokens = passages, tokens
        self.documents = [
            Document(words(tokens, generator, model.tokenizer.encode)) for _ in range(passages)
        ]
        self.questions = [
            words(QUESTION_TOKENS, generator, model.tokenizer.encode)
            for _ in range(arguments.rounds + 1)
        ]
        needed = dict.fromkeys([EXACT, *arguments.codecs])  # floor and baselines need exact ones
        self.laid = {c: Laid(model, directory / c, self.documents, c) for c in needed}
        self.baselines = Baselines(model, self.laid[EXACT].source)
        self.seconds: Seconds = {}
        self.facts: dict[str, Row] = {}
        self.stages: dict[str, list[Trace]] = {}
        self.disk: Seconds = {}  # to read a codec's files cold

    def measure(self) -> list[Row]:
        """Check, then rounds; one row a way."""
        first, *others = (self.model.prompt(self.documents, q) for q in self.questions)
        for codec in self.arguments.codecs:
            for place in self.arguments.places:
                laid = self.laid[codec]
                check(self.model, first, laid.at(place))
                if place == "cold":
                    print(
                        f"# {codec} cold: before each question the pages of all {len(laid.files)} "
                        f"files ({laid.nbytes:,} bytes) are dropped, and mincore finds none"
                    )
        self.one_round(first)  # to warm up
        for kept in (self.seconds, self.stages, self.disk):
            kept.clear()
        for prompt in others:
            self.one_round(prompt)
        for laid in self.laid.values():
            laid.close()
        return [self.row(name) for name in self.seconds]

    def one_round(self, prompt: list[Part]) -> None:
        """Each way once, on one new question."""
        exact = self.laid[EXACT]
        bare = floor(self.model, self.model.layout(prompt), exact.at("cached"))
        self.note("floor", "floor", bare)
        for codec in self.arguments.codecs:
            if "cold" in self.arguments.places:
                self.disk.setdefault(codec, []).append(read_cold(self.laid[codec].files))
            for place in self.arguments.places:
                reuse = self.laid[codec].at(place)
                trace = first_token(self.model, prompt, reuse)
                name = f"reuse {codec} {place}"
                self.note(name, "reuse", trace.first_token_ms / 1e3, codec=codec, place=place,
                          computed_tokens=trace.computed_tokens,
                          reused_tokens=trace.reused_tokens,
                          snapshot_bytes=self.laid[codec].nbytes)  # fmt: skip
                self.stages.setdefault(name, []).append(trace)
        logits: dict[str, torch.Tensor] = {}
        for way in self.arguments.ways:
            logits[way] = self.baseline(way, prompt)
        for way in {"prefix", "forward"} & logits.keys() if "full" in logits else ():
            same(self.model, way, logits[way], logits["full"])

    def baseline(self, way: str, prompt: list[Part]) -> torch.Tensor:
        """One of the ways of `Baselines`; full and forward by transformers itself."""
        if way in ("full", "forward"):
            laid = self.baselines.layout(prompt)
            run = generate if way == "full" else bare_forward
            seconds, logits = run(self.model, laid)
            self.note(
                way,
                way,
                seconds,
                computed_tokens=len(laid),
                attention=best_attention(self.model),
            )
            return logits
        self.baselines.forget()
        if way != "prefix":
            self.laid[EXACT].at("cached")
        self.baselines.start(way, self.earlier())  # type: ignore[arg-type]
        found: list[Started] = []
        seconds = timed(self.model, lambda: found.append(self.baselines.start(way, prompt)))  # type: ignore[arg-type]
        reads = {} if way == "prefix" else {"codec": EXACT, "place": "cached"}
        self.note(way, way, seconds, computed_tokens=found[0].computed_tokens, **reads)
        if way == "prefix" and found[0].computed_tokens >= len(found[0].prompt):
            refuse("prefix caching reused nothing")
        return found[0].logits.cpu()

    def earlier(self) -> list[Part]:
        """The prompt before: the same system prompt and first passages, then another one."""
        shared = self.documents[: self.arguments.shared_passages]
        return self.model.prompt([*shared, Document("w1 w2 w3")], "w1")

    def note(self, name: str, way: str, seconds: float, **facts: Any) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        self.facts[name] = {"way": way, **facts}

    def row(self, name: str) -> Row:
        """Percentiles of one way, and the medians of its ratios within each round."""
        taken = self.seconds[name]
        row: Row = {
            "model": self.model.name,
            "size": f"{self.passages}x{self.tokens}",
            "passages": self.passages,
            "tokens_per_passage": self.tokens,
            "dtype": self.model.backbone.dtype_name,
            **self.facts[name],
            "ttft_p50_s": round(median(taken), 5),
            "ttft_p95_s": round(percentile(taken, 0.95), 5),
        }
        for other in ("floor", *WAYS):
            if other in self.seconds:
                ratios = (a / b for a, b in zip(taken, self.seconds[other], strict=True))
                row[f"over_{other}"] = round(median(ratios), 4)
        if traces := self.stages.get(name):
            row |= {"source": row["place"], **self.side_by_side(name)}
            row |= {
                f"{s}_ms": round(median(getattr(t, f"{s}_ms") for t in traces), 3) for s in STAGES
            }
        if row.get("place") == "cold":
            row |= self.against_disk(row)
        return row

    def against_disk(self, row: Row) -> Row:
        """The disk's own rate, and the time that a first token from cold files may take."""
        seconds = median(self.disk[row["codec"]])
        target = COLD_TARGET * median(self.seconds["floor"]) + seconds
        return {
            "disk_s": round(seconds, 5),
            "disk_gb_per_s": round(row["snapshot_bytes"] / seconds / 1e9, 3),
            "target_s": round(target, 5),
            "within_target": row["ttft_p50_s"] <= target,
        }

    def side_by_side(self, name: str) -> Row:
        """Medians of one way of reuse, of full prefill and of the floor, for a row that has all."""
        ways = {"reuse": name, "full": "full", "floor": "floor"}
        return {
            f"ttft_{way}_s": round(median(self.seconds[key]), 5)
            for way, key in ways.items()
            if key in self.seconds
        }


def same(model: KVLinkModel, way: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse where a way that must be exact is not."""
    verdict = compare(logits, expected, TOLERANCE[model.backbone.dtype])
    if not verdict.holds:
        refuse(f"{way} does not give the full prefill's logits ({verdict.difference:.2e})")


def generate(model: KVLinkModel, laid: Layout) -> tuple[float, torch.Tensor]:
    """Seconds and logits of one token by transformers' own `generate` over the whole prompt."""
    ids = laid.token_ids[None].to(model.backbone.device)
    found: list[Any] = []

    def call() -> None:
        output = model.backbone.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        output.sequences[0, -1].item()
        found.append(output.logits[0][0])

    return plainly(model, call, best_attention(model)), found[0].float().cpu()


def bare_forward(model: KVLinkModel, laid: Layout) -> tuple[float, torch.Tensor]:
    """Seconds and logits of transformers' own forward over the whole prompt."""
    ids = laid.token_ids[None].to(model.backbone.device)
    found: list[torch.Tensor] = []

    def call() -> None:
        output = model.backbone.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        output.logits.argmax().item()
        found.append(output.logits[0, -1].float().cpu())

    return plainly(model, call, best_attention(model)), found[0]


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
    backbone.give_back(assembled.cache)  # as an answer does when it ends
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
    return plainly(
        model,
        lambda: (
            backbone.model(logits_to_keep=1, **inputs, **as_argument(cache, backbone.model))
            .logits.argmax()
            .item()
        ),
    )


def plainly(model: KVLinkModel, call: Any, attention: str = "sdpa") -> float:
    """Seconds of `call` with transformers' own attention."""
    config = model.backbone.config
    ours, config._attn_implementation = config._attn_implementation, attention
    try:
        return timed(model, call)
    finally:
        config._attn_implementation = ours


def best_attention(model: KVLinkModel) -> str:
    """The name of transformers' fastest attention for a causal prompt on this machine."""
    half = model.backbone.dtype in (torch.bfloat16, torch.float16)
    flash = model.backbone.device.type == "cuda" and half and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


IN_WORDS = {
    "floor": "floor: transformers' own forward of\nreuse's tokens, all else in memory",
    "full": "full prefill (transformers' generate)",
    "forward": "full prefill (transformers' forward alone)",
    "prefix": "prefix caching, one passage shared",
    "naive": "snapshots side by side, no link tokens",
    "cacheblend": "CacheBlend: 15 % computed again",
    "epic": "EPIC: 16 tokens a passage computed again",
}
WHERE = {"cold": "cold files", "cached": "files in the page cache", "ram": "in memory"}


def in_words(row: Row) -> str:
    """A way, for people."""
    if row["way"] != "reuse":
        return IN_WORDS[row["way"]]
    return f"reuse: {row['codec']} snapshots, {WHERE[row['place']]}"


def plot(axes: Any, rows: list[Row]) -> None:
    """A bar for each size and way, from zero, with its seconds and its share of a full prefill."""
    names, at = [], 0.0
    for size in dict.fromkeys(row["size"] for row in rows):
        passages, tokens = size.split("x")
        names.append((at, f"{passages} passages of {tokens} tokens"))
        for row in (row for row in rows if row["size"] == size):
            at += 1
            names.append((at, in_words(row)))
            seconds, share = row["ttft_p50_s"], row.get("over_full")
            colour = {"reuse": "#1f77b4", "floor": "#9ecae1"}.get(row["way"], "#bdbdbd")
            axes.barh(at, seconds, color=colour, height=0.7)
            told = f" {seconds:.3g} s" + (
                f" ({100 * share:.1f} %)" if share not in (None, 1) else ""
            )
            axes.text(seconds, at, told, va="center", fontsize=8)
        at += 1.6
    axes.set_yticks([place for place, _ in names], [name for _, name in names], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(0, None)
    axes.set_xlabel("seconds to first token, median (share of full prefill, of the same rounds)")
    axes.figure.set_size_inches(8, 1.2 + 0.3 * at)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=15)
    options.add_argument(
        "--sizes",
        nargs="+",
        default=["10x200", "10x500"],
        metavar="PxT",
        help=f"passages x tokens, or a group of sizes: {', '.join(GROUPS)}",
    )
    options.add_argument("--codecs", nargs="+", default=[EXACT], choices=CODECS)
    options.add_argument("--places", nargs="+", default=["cached"], choices=PLACES)
    options.add_argument("--ways", nargs="*", default=["full"], choices=WAYS)
    options.add_argument("--shared-passages", type=int, default=1, help="with the prompt before")
    arguments = options.parse_args()
    arguments.sizes = expanded(arguments.sizes)
    return arguments


def expanded(sizes: list[str]) -> list[str]:
    """Each size once, groups by their members."""
    return list(dict.fromkeys(size for name in sizes for size in GROUPS.get(name, [name])))


if __name__ == "__main__":
    main()
