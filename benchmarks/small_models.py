"""What link tokens buy: the bundled model beside models trained with other numbers of them.

    python -m kvlink_rag.training.small --out runs/small --compared links-5 links-1 links-0 full \
        links-5-dependent links-0-dependent
    python benchmarks/small_models.py --models runs/small --out runs/small-models

Each model answers held-out questions of the generated world in the modes it was trained for and in
those of the baselines, through `kvlink-rag eval`; a model trained with full attention alone says
what the baselines reach on a model of their own. Tables in per cent of final answers with 95 %
intervals: by kind of question over ten passages, by number of passages, by place of the gold
passage. A stopped run goes on where it was; a larger --n adds questions. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Row, draw, finish

from kvlink_rag.cli.main import main as kvlink_rag
from kvlink_rag.evaluation.records import Record, read
from kvlink_rag.evaluation.summary import Line, summarize
from kvlink_rag.training.held_out import DEPENDENT, KINDS, write

TEN, SIZES = 10, (2, 5, 20)
SIZED = ("one-hop", "two-hop", "continued")  # asked over other numbers of passages as well
BASELINES = ("naive", "cacheblend", "epic")
STYLES = {"full": ":", "reuse": "-", "naive": "--"}  # of lines in the figures
MODES = {
    "bundled": ("full", "masked", "reuse", "reuse:0", *BASELINES),
    "links-5": ("full", "reuse", "reuse:0", "naive"),
    "links-1": ("reuse",),
    "links-0": ("reuse",),
    "full": ("full", *BASELINES),
    "links-5-dependent": ("full", "reuse", "reuse:0"),
    "links-0-dependent": ("reuse",),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One run of `kvlink-rag eval` for each model, over the questions in one folder."""

    name: str
    share: float  # of --n, for each kind and number of passages
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    options: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # modes


PARTS = (
    Part("kinds", 1.0, (TEN,), (*KINDS, *DEPENDENT)),
    Part("passages", 0.3, SIZES, SIZED, left_out=("masked",)),
    Part("places", 0.1, (TEN,), ("one-hop",), ("--gold-at", f"0-{TEN - 1}"), ("masked",)),
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    for part in () if arguments.tables else PARTS:
        folder = questions_of(arguments, part)
        write(
            folder, max(1, round(arguments.n * part.share)), part.sizes, arguments.seed, part.kinds
        )
        for name in arguments.names:
            evaluate(arguments, part, name)
    by_kind = lines(arguments, PARTS[:2])
    places = lines(arguments, PARTS[2:])
    tables(by_kind, places)
    figures(arguments.figure, by_kind)
    finish(arguments, [row(line) for line in (*by_kind, *places)])


def questions_of(arguments: argparse.Namespace, part: Part) -> Path:
    return Path(arguments.out, "questions", part.name)


def evaluate(arguments: argparse.Namespace, part: Part, name: str) -> None:
    """One model's answers to one part. Stops where reuse said something else than masked."""
    model = name if name == "bundled" else str(Path(arguments.models, name))
    modes = ",".join(mode for mode in MODES[name] if mode not in part.left_out)
    code = kvlink_rag(
        [
            *("--model", model, "--dtype", "float32", "eval", "generated"),
            *("--data", str(questions_of(arguments, part))),
            *("--out", str(Path(arguments.out, name, part.name))),
            *("--modes", modes, "--max-new-tokens", "48", "--batch", "32", "--by", "kind,passages"),
            *part.options,
        ]
    )
    if code:
        raise SystemExit(f"no figures: the evaluation of {name} ({part.name}) ended with {code}")


def lines(arguments: argparse.Namespace, parts: Sequence[Part]) -> list[Line]:
    """The summary of some parts of all models, with a line for each kind and number of passages."""
    found: list[Line] = []
    for name in arguments.names:
        records: list[Record] = []
        for part in parts:
            if arguments.tables and not Path(arguments.out, name, part.name).exists():
                continue
            records += read(Path(arguments.out, name, part.name))
        found += summarize(records, by=("kind", "passages"))
    return found


def label(line: Line) -> tuple[str, str]:
    return Path(line.model).name, line.mode


def row(line: Line) -> Row:
    """A line as JSON has it: shares to four digits."""
    score, other = line.scores["final"], line.difference
    return {
        "model": label(line)[0],
        "mode": line.mode,
        "kind": line.kind,
        "passages": line.passages,
        "gold_at": line.gold_at,
        "questions": line.examples,
        "final": [round(each, 4) for each in (score.mean, score.low, score.high)],
        "against_full": other and [round(each, 4) for each in (other.mean, other.low, other.high)],
    }


def tables(by_kind: Sequence[Line], places: Sequence[Line]) -> None:
    """The three tables, in Markdown."""
    ten = [line for line in by_kind if line.passages == TEN]
    table(ten, [*KINDS, *DEPENDENT], lambda line: line.kind)
    for kind in SIZED:
        print(f"{kind}, by number of passages:\n")
        own = [line for line in by_kind if line.kind == kind]
        table(own, sorted([*SIZES, TEN]), lambda line: line.passages)
    print("one-hop, by place of the gold passage:\n")
    table([line for line in places if line.gold_at is not None], range(TEN), lambda r: r.gold_at)


def table(found: Sequence[Line], columns: Iterable[Any], column: Any) -> None:
    """A row for each model and mode, a column for each value of `column`."""
    columns = list(columns)
    cells = {(label(line), column(line)): line for line in found}
    counts = [next((n.examples for (_, c), n in cells.items() if c == each), 0) for each in columns]
    print("| model | mode | " + " | ".join(map(str, columns)) + " |")
    print("|---|---|" + "---|" * len(columns))
    print("| questions | | " + " | ".join(map(str, counts)) + " |")
    for name in dict.fromkeys(label(line) for line in found):
        told = [str(cells[name, c].scores["final"]) if (name, c) in cells else "" for c in columns]
        print("| " + " | ".join((*name, *told)) + " |")
    print(flush=True)


def figures(path: str | None, by_kind: Sequence[Line]) -> None:
    """The share of right answers over the number of passages, one picture for each kind."""
    shown = [line for line in by_kind if line.mode in STYLES]
    for kind in SIZED if path else ():
        if own := [line for line in shown if line.kind == kind]:
            title = f"{kind} questions of the generated world, small models"
            draw(f"{path}_{kind}", partial(plot, found=own), title=title)


def plot(axes: Any, found: Sequence[Line]) -> None:
    """A colour for each model, a kind of line for each mode."""
    models = list(dict.fromkeys(label(line)[0] for line in found))
    for name in dict.fromkeys(label(line) for line in found):
        own = [line for line in found if label(line) == name]
        sizes, scores = [line.passages for line in own], [line.scores["final"] for line in own]
        color, style = f"C{models.index(name[0])}", STYLES[name[1]]
        means = [100 * score.mean for score in scores]
        axes.plot(sizes, means, style, marker="o", color=color, label=" ".join(name))
        low, high = [100 * s.low for s in scores], [100 * s.high for s in scores]
        axes.fill_between(sizes, low, high, alpha=0.06, color=color)
    axes.set_xticks(sorted([*SIZES, TEN]))
    axes.set_xlabel("passages")
    axes.set_ylabel("final answers, % (95 % interval)")
    axes.set_ylim(0, 102)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="runs/small", help="their folder")
    parser.add_argument("--names", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", default="runs/small-models")
    parser.add_argument("--n", type=int, default=100, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="ask nothing, show what is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", help="write PATH_KIND.png and PATH_KIND.svg")
    return parser.parse_args()


if __name__ == "__main__":
    main()
