"""Writes held-out questions of the generated world for `kvlink-rag eval generated --data FILE`.

    python -m kvlink_rag.training.held_out --out runs/held-out --n 200 --k 2 5 10 20

One file for each kind of question and number of passages; `--data` takes the folder as well. For
one seed the questions of a kind are the same whatever their number of passages, so that only the
distractors differ. Those that hang on another passage (continued, same, table) have a small world
each, other questions for each number, and the pages around them depend on each other as well.
Knows the generated world; knows no model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from . import facts
from .evaluate_small import absent
from .formats import document
from .questions import Question, context, dependent, one_hop, two_hop, two_hop_facts
from .retriever import large_world
from .world import Builder, Dependence, Page, World

KINDS = ("one-hop", "two-hop", "absent")
DEPENDENT: tuple[Dependence, ...] = tuple(each for each in get_args(Dependence) if each)
PAGES = 600


def questions(world: World, kind: str, n: int, seed: int) -> Iterator[Question]:
    """n questions of one kind about names that training never saw."""
    rng = random.Random(f"held-out-{kind}-{seed}")
    stated, hops = [fact for fact, _ in world.stated.values()], list(two_hop_facts(world))
    for _ in range(n):
        if kind == "one-hop":
            yield one_hop(world, rng.choice(stated), rng)
        elif kind == "two-hop":
            yield two_hop(world, *rng.choice(hops), rng)
        else:
            yield absent(world, rng)


def across(
    kind: Dependence, k: int, n: int, seed: int
) -> Iterator[tuple[Question, tuple[Page, ...]]]:
    """n questions that hang on another page as `kind` says, each over k pages of its own world."""
    rng, count = random.Random(f"held-out-{kind}-{k}-{seed}"), 0
    while count < n:
        about = rng.choice(facts.KINDS)
        table = about if kind == "table" else ""
        world = Builder(rng, "heldout", {about: k + 2}, dependent=0.5, table=table).build()
        if found := dependent(world, k, kind, rng):
            count += 1
            yield found


def row(question: Question, pages: Sequence[Page], kind: str, number: int) -> dict[str, object]:
    """The question over these pages, in the schema of lost-in-the-middle."""
    ctxs = [
        {"title": d.title, "text": d.text, "isgold": page.id in question.gold}
        for page, d in ((page, document(page)) for page in pages)
    ]
    return {
        "id": f"{kind}-{len(pages)}-{number}",
        "question": question.text,
        "answers": [question.answer],
        "kind": kind,
        "ctxs": ctxs,
    }


def write(
    out: Path,
    n: int,
    sizes: Sequence[int],
    seed: int,
    kinds: Sequence[str] = (*KINDS, *DEPENDENT),
) -> list[Path]:
    """The files `KIND-K.jsonl` in `out`. A larger n adds questions after the same first ones."""
    out.mkdir(parents=True, exist_ok=True)
    world = large_world(random.Random(f"held-out-{seed}"), "heldout", PAGES)
    written = []
    for kind in (each for each in KINDS if each in kinds):
        asked = list(questions(world, kind, n, seed))
        for k in sizes:
            rngs = (random.Random(f"context-{seed}-{i}") for i in range(n))
            over = [(q, context(world, q, k, rng)) for q, rng in zip(asked, rngs, strict=True)]
            written.append(_write(out, kind, k, over))
    for other in (each for each in DEPENDENT if each in kinds):
        written += [_write(out, other, k, list(across(other, k, n, seed))) for k in sizes]
    return written


def _write(out: Path, kind: str, k: int, over: Sequence[tuple[Question, Sequence[Page]]]) -> Path:
    path = out / f"{kind}-{k}.jsonl"
    rows = (row(question, pages, kind, i) for i, (question, pages) in enumerate(over))
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write held-out questions of the generated world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200, help="questions of each kind (200)")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 5, 10, 20], help="passages")
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *DEPENDENT), help="(all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    kinds = given.kinds or (*KINDS, *DEPENDENT)
    for path in write(given.out, given.n, given.k, given.seed, kinds):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
