"""Writes held-out questions of the generated world for `kvlink-rag eval generated --data FILE`.

    python -m kvlink_rag.training.held_out --out runs/held-out --n 200 --k 2 5 10 20

One file for each kind of question and number of passages. For one seed the questions are the same
whatever their number of passages, so that only the distractors differ. Knows the generated world;
knows no model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .evaluate_small import absent
from .formats import document
from .questions import Question, context, one_hop, two_hop, two_hop_facts
from .retriever import large_world
from .world import World

KINDS = ("one-hop", "two-hop", "absent")
PAGES = 600


def questions(world: World, kind: str, n: int, seed: int) -> Iterator[Question]:
    """n questions of one kind about names that training never saw."""
    rng = random.Random(f"held-out-{kind}-{seed}")
    facts, hops = [fact for fact, _ in world.stated.values()], list(two_hop_facts(world))
    for _ in range(n):
        if kind == "one-hop":
            yield one_hop(world, rng.choice(facts), rng)
        elif kind == "two-hop":
            yield two_hop(world, *rng.choice(hops), rng)
        else:
            yield absent(world, rng)


def row(world: World, question: Question, k: int, number: int, seed: int) -> dict[str, object]:
    """The question over k pages, in the schema of lost-in-the-middle."""
    pages = context(world, question, k, random.Random(f"context-{seed}-{number}"))
    ctxs = [
        {"title": d.title, "text": d.text, "isgold": page.id in question.gold}
        for page, d in ((page, document(page)) for page in pages)
    ]
    return {
        "id": number,
        "question": question.text,
        "answers": [question.answer],
        "kind": question.kind,
        "ctxs": ctxs,
    }


def write(out: Path, n: int, sizes: Sequence[int], seed: int) -> list[Path]:
    """The files `KIND-K.jsonl` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    world = large_world(random.Random(f"held-out-{seed}"), "heldout", PAGES)
    written = []
    for kind in KINDS:
        asked = list(questions(world, kind, n, seed))
        for k in sizes:
            path = out / f"{kind}-{k}.jsonl"
            rows = (row(world, question, k, i, seed) for i, question in enumerate(asked))
            path.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write held-out questions of the generated world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200, help="questions of each kind (200)")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 5, 10, 20], help="passages")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    for path in write(given.out, given.n, given.k, given.seed):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
