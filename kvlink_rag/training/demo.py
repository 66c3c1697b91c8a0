"""The demo's documents and questions: one held-out world, written as JSON lines.

`documents.jsonl` holds {"id", "title", "text"}; `questions.jsonl` holds {"question", "answer",
"kind", "gold"}, where kind is "one-hop", "two-hop" or "absent" and gold lists the ids of the
documents an answer rests on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .facts import Relation, relations_of
from .questions import Question, absent_one_hop, one_hop, two_hop, two_hop_facts
from .retriever import large_world
from .world import Entity, World

PAGES = 300


def write_demo(directory: Path, seed: int, *, each: int = 60) -> None:
    """Documents and `each` questions of each kind."""
    rng = random.Random(f"demo-{seed}")
    world = large_world(rng, "heldout", PAGES)
    pages = ({"id": p.id, "title": p.title, "text": p.text} for p in world.pages.values())
    _write(directory / "documents.jsonl", pages)
    _write(directory / "questions.jsonl", map(_row, _questions(world, rng, each)))


def _questions(world: World, rng: random.Random, each: int) -> Iterable[Question]:
    """Kinds in turn, so that the first few lines already show all of them."""
    hops = rng.sample(list(two_hop_facts(world)), each)
    facts = rng.sample([fact for fact, _ in world.stated.values()], each)
    gaps = rng.sample(_unstated(world), each)
    for fact, (first, second), (entity, relation) in zip(facts, hops, gaps, strict=True):
        yield one_hop(world, fact, rng)
        yield two_hop(world, first, second, rng)
        yield absent_one_hop(entity, relation, (), rng)


def _unstated(world: World) -> list[tuple[Entity, Relation]]:
    """What one could ask about things that are named as values but have no page of their own."""
    known = {page.about for page in world.pages.values()}
    values = {fact.value for fact, _ in world.stated.values() if isinstance(fact.value, Entity)}
    strangers = sorted(values - known, key=lambda entity: entity.name)
    return [(entity, relation) for entity in strangers for relation in relations_of(entity.kind)]


def _row(question: Question) -> Mapping[str, Any]:
    gold = [] if question.kind == "absent" else list(question.gold)
    return {
        "question": question.text,
        "answer": question.answer,
        "kind": question.kind,
        "gold": gold,
    }


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
