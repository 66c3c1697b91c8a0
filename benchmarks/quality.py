"""What speed costs: answers and next-token distributions of each codec and each baseline.

    python benchmarks/quality.py --data nq.jsonl --questions 180
    python benchmarks/quality.py --codecs int8 --ways cacheblend epic

Questions, of a file or about the countries of the demonstration, each over the passages that the
embedder retrieves for it (k = 10). Every way takes the same passages:
    reuse        snapshots in each codec, link tokens
    full, naive, cacheblend, epic   see `kvlink_rag.compare.baselines`; without link tokens
A way is held against its reference along the reference's greedy answer, up to `--tokens` tokens:
Kullback-Leibler divergence of the next token (nats, mean over all places), and how often the best
token is the same. Reference of a codec is reuse of exact snapshots; of reuse of exact snapshots and
of the baselines, full: for a model that was tuned with link tokens, to differ from it is no fault.
right: answers that hold an expected one (or, where the passages hold none, that say so), of each
way's own greedy answer. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from asked import add_options, load_asked
from measuring import Row, draw, finish, load, parser, show

from kvlink_rag import KVLinkModel, KVLinkRAG, Part, Trace
from kvlink_rag.arguments import CODECS
from kvlink_rag.compare.baselines import METHODS, Baselines, Method
from kvlink_rag.datasets.countries import Question
from kvlink_rag.model.decode import decode_one_token
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.snapshots.snapshot import EXACT
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

PASSAGES, ANSWER_TOKENS = 10, 48
COLUMNS = ("way", "codec", "reference", "questions", "places", "divergence", "top1", "right")

Step = Callable[[int], torch.Tensor]  # a token's logits [vocab] of the next


def main() -> None:
    arguments = parse()
    model = load(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        prompts = retrieved(model, Path(directory) / "collection", arguments)
        rows = judge(model, Path(directory), prompts, arguments)
    show(rows, COLUMNS)
    draw(arguments.figure, lambda axes: plot(axes, rows), title=f"Divergence, {model.name}")
    finish(arguments, rows)


def retrieved(
    model: KVLinkModel, directory: Path, arguments: argparse.Namespace
) -> list[tuple[list[Part], Question]]:
    """Each question and its prompt."""
    documents, asked = load_asked(arguments)
    with KVLinkRAG.open(directory, model=model, embedder=arguments.embedder) as rag:
        rag.add(documents)
        found = []
        for question in asked:
            hits = rag.search(question.question, PASSAGES)
            parts = model.prompt([hit.document for hit in hits], question.question)
            found.append((parts, question))
    return found


@dataclass
class Way:
    """One way through the model: to begin a prompt, and to answer it; what was seen of it."""

    name: str
    codec: str
    reference: str
    begin: Callable[[list[Part], int], tuple[torch.Tensor, Step]]
    answer: Callable[[list[Part]], str]
    divergence: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"reuse {self.codec}" if self.name == "reuse" else self.name

    def compare(self, parts: list[Part], tokens: list[int], expected: list[torch.Tensor]) -> None:
        """Hold this way against the reference's logits along its `tokens`."""
        for logits, wanted in zip(along(self, parts, tokens), expected, strict=True):
            log, exact = (t.double().log_softmax(-1) for t in (logits, wanted))
            self.divergence.append(max(0.0, float((exact.exp() * (exact - log)).sum())))
            self.same.append(bool(logits.argmax() == wanted.argmax()))

    def row(self) -> Row:
        return {
            "way": self.name,
            "codec": self.codec,
            "reference": self.reference,
            "questions": len(self.right),
            "places": len(self.divergence),
            "divergence": _mean(self.divergence),
            "top1": _mean(self.same),
            "right": _mean(self.right),
        }


def _mean(values: list[Any]) -> float | None:
    return round(sum(values) / len(values), 8) if values else None


def judge(
    model: KVLinkModel,
    directory: Path,
    prompts: list[tuple[list[Part], Question]],
    arguments: argparse.Namespace,
) -> list[Row]:
    """All ways over all prompts."""
    ways = make_ways(model, directory, arguments)
    for parts, question in prompts:
        for name in dict.fromkeys(way.reference for way in ways):
            tokens, logits = greedy(model, next(w for w in ways if w.label == name), parts,
                                    arguments.tokens)  # fmt: skip
            for way in ways:
                if way.reference == name:
                    way.compare(parts, tokens, logits)
        for way in ways:
            way.right.append(question.is_right(way.answer(parts)))
    return [way.row() for way in ways]


def make_ways(model: KVLinkModel, directory: Path, arguments: argparse.Namespace) -> list[Way]:
    """Reuse in exact and each codec, full, and each other baseline."""
    made = [reused(model, directory, codec) for codec in dict.fromkeys([EXACT, *arguments.codecs])]
    source = StoredSnapshots(SnapshotStore(directory / EXACT), model.encoder)
    others = Baselines(model, source)
    return made + [baseline(model, others, m) for m in dict.fromkeys(["full", *arguments.ways])]


def reused(model: KVLinkModel, directory: Path, codec: str) -> Way:
    source = StoredSnapshots(SnapshotStore(directory / codec), model.encoder, codec=codec)
    reuse = Reuse(source)

    def begin(parts: list[Part], room: int) -> tuple[torch.Tensor, Step]:
        run = PromptRun(model.backbone, model.layout(parts), Trace(), reuse)
        return run.start(room), run.step

    def answer(parts: list[Part]) -> str:
        return model.generate(parts, reuse=reuse, max_new_tokens=ANSWER_TOKENS)

    return Way("reuse", codec, "full" if codec == EXACT else f"reuse {EXACT}", begin, answer)


def baseline(model: KVLinkModel, ways: Baselines, method: Method) -> Way:
    def begin(parts: list[Part], room: int) -> tuple[torch.Tensor, Step]:
        started = ways.start(method, parts, room=room)
        said: list[int] = []

        def step(token: int) -> torch.Tensor:
            position = len(started.prompt) + len(said)
            said.append(token)
            return decode_one_token(model.backbone, token, position, started.cache)

        return started.logits, step

    def answer(parts: list[Part]) -> str:
        return ways.generate(method, parts, max_new_tokens=ANSWER_TOKENS)

    return Way(method, EXACT, "full", begin, answer)


def greedy(
    model: KVLinkModel, way: Way, parts: list[Part], most: int
) -> tuple[list[int], list[torch.Tensor]]:
    """The reference's answer, and its logits before each token of it and after the last."""
    logits, step = way.begin(parts, most)
    tokens: list[int] = []
    seen = [logits.cpu()]
    while len(tokens) < most and int(seen[-1].argmax()) not in model.end_ids:
        tokens.append(int(seen[-1].argmax()))
        seen.append(step(tokens[-1]).cpu())
    return tokens, seen


def along(way: Way, parts: list[Part], tokens: list[int]) -> list[torch.Tensor]:
    """Logits before each of `tokens`, and after the last, whatever this way would have said."""
    logits, step = way.begin(parts, len(tokens))
    return [logits.cpu(), *(step(token).cpu() for token in tokens)]


def plot(axes: Any, rows: list[Row]) -> None:
    names = [row["way"] if row["way"] != "reuse" else f"reuse {row['codec']}" for row in rows]
    axes.barh(names, [row["divergence"] for row in rows])
    axes.set_xscale("symlog", linthresh=1e-6)
    axes.set_xlabel("mean divergence from the reference (nats)")


def parse() -> argparse.Namespace:
    options = parser(__doc__, model=DEFAULT, dtype="auto")
    add_options(options)
    options.add_argument("--tokens", type=int, default=16, help="of an answer that are compared")
    options.add_argument("--codecs", nargs="*", default=list(CODECS[1:]), choices=CODECS)
    options.add_argument(
        "--ways", nargs="*", default=["naive", "cacheblend", "epic"], choices=METHODS
    )
    return options.parse_args()


if __name__ == "__main__":
    main()
