"""Questions over generated worlds, and the contexts that they are asked in.

Knows which pages an answer rests on and which pages would give it away, so that a question can
be asked where the fact is present and where it is missing. Knows nothing about tokens, prompts
or models.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from kvlink_rag.datasets.answers import ABSENT

from .facts import (
    KINDS,
    Relation,
    bridges_of,
    generic_questions,
    relations_of,
)
from .names import Split
from .world import SIZES, Builder, Dependence, Entity, Fact, Page, World

_T = TypeVar("_T")
QuestionKind = Literal["one-hop", "two-hop", "absent"]


@dataclass(frozen=True, slots=True)
class Question:
    """`answer` is the full reply; `gold` are the ids of the pages that it rests on.

    `missing` are pages that must not stand in the context (an absent fact's), `kinds` those of
    good distractors.
    """

    text: str
    answer: str
    kind: QuestionKind
    gold: tuple[str, ...]
    kinds: tuple[str, ...]
    missing: tuple[str, ...] = ()
    dependence: Dependence = ""


@dataclass(frozen=True, slots=True)
class Exercise:
    """Pages in prompt order and questions that are asked over all of them, each on its own."""

    pages: tuple[Page, ...]
    questions: tuple[Question, ...]


def one_hop(world: World, fact: Fact, rng: random.Random) -> Question:
    """Asks for a stated fact. One that is stated as the same as another's is answered through
    the other.
    """
    page = world.pages[world.stated[fact.subject.name, fact.relation.role][1]]
    gold = [page.id, *(i for i in (page.after, page.header) if i)]
    answer = fact.answer
    dependence: Dependence = "" if page.dependence == "same" else page.dependence
    if fact.same_as is not None:
        source = world.find(fact.same_as, fact.relation)
        gold += [source[1]] if source else []
        answer, dependence = _whose(fact.same_as, fact.relation, fact.answer), "same"
    text = _ask(fact.relation, fact.subject.mention, rng)
    return Question(text, answer, "one-hop", tuple(gold), (fact.subject.kind,), (), dependence)


def two_hop(world: World, first: Fact, second: Fact, rng: random.Random) -> Question:
    """Asks for a fact of the value of another fact, without naming it."""
    gold = tuple(world.stated[f.subject.name, f.relation.role][1] for f in (first, second))
    answer = _whose(second.subject, second.relation, second.answer)
    text = _ask(second.relation, _describe(first, rng), rng)
    return Question(text, answer, "two-hop", gold, (first.subject.kind, second.subject.kind))


def absent_one_hop(
    subject: Entity, relation: Relation, missing: tuple[str, ...], rng: random.Random
) -> Question:
    """Asks for a fact that no page of the context states."""
    text = _ask(relation, subject.mention, rng)
    return Question(text, ABSENT, "absent", (), (subject.kind,), missing)


def absent_two_hop(
    world: World,
    first: Fact,
    relation: Relation,
    lacking: Literal["first", "second"],
    rng: random.Random,
) -> Question:
    """A two-hop question one of whose facts is missing; a bridge that is known is still named."""
    assert isinstance(first.value, Entity)
    text = _ask(relation, _describe(first, rng), rng)
    kinds = (first.subject.kind, first.value.kind)
    page, second = (
        world.stated[first.subject.name, first.relation.role][1],
        world.find(first.value, relation),
    )
    if lacking == "first":
        return Question(text, ABSENT, "absent", (), kinds, (page,))
    answer = f"{first.value.name}, whose {relation.role} {ABSENT[0].lower()}{ABSENT[1:]}"
    return Question(text, answer, "absent", (page,), kinds, (second[1],) if second else ())


def two_hop_facts(world: World) -> Iterator[tuple[Fact, Fact]]:
    """All pairs of outright facts on two pages that chain."""
    for first, page in world.stated.values():
        if (
            first.relation.descriptions
            and isinstance(first.value, Entity)
            and _outright(world, first, page)
        ):
            for relation in relations_of(first.value.kind, plain=world.plain):
                found = world.find(first.value, relation)
                if found and found[1] != page and _outright(world, *found):
                    yield first, found[0]


def context(world: World, question: Question, k: int, rng: random.Random) -> tuple[Page, ...]:
    """The gold pages among k - len(gold) others of the same kinds, shuffled."""
    barred = {*question.gold, *question.missing}
    pages = [world.pages[i] for i in question.gold]
    others = [
        p for p in world.pages.values() if p.id not in barred and p.about and not p.dependence
    ]
    for kind in question.kinds:
        of_kind = [p for p in others if p.about and p.about.kind == kind and p not in pages]
        share = k // len(question.kinds) - sum(1 for p in pages if p.about and p.about.kind == kind)
        pages += _sample(of_kind, max(0, share), rng)
    rest = [p for p in others if p not in pages and p.about and p.about.kind in question.kinds]
    pages += _sample(rest, k - len(pages), rng)
    rng.shuffle(pages)
    return tuple(pages)


def exercise(
    rng: random.Random,
    k: int,
    *,
    questions: int = 12,
    absent: float = 0.2,
    plain: float = 0.0,
    sizes: Sequence[int] = SIZES,
    dependent: float = 0.25,
    across: float = 0.2,
    strange: float = 0.0,
    split: Split = "train",
) -> Exercise:
    """A small world of its own, k of its pages, and a mixture of questions over them, of which the
    share `absent` asks for what the pages do not say; `plain` is the chance of a plain world,
    `dependent` that of one whose pages depend on each other, `strange` that of one with names of
    any syllables, `sizes` as in `Builder`. `across` is the share of questions, as far as there are
    any, whose answer hangs on another page.
    """
    world = _small_world(
        rng,
        k,
        split,
        plain=plain > 0 and rng.random() < plain,
        sizes=sizes,
        dependent=dependent,
        strange=strange > 0 and rng.random() < strange,
    )
    pages = _choose(list(world.pages.values()), k, rng)
    return Exercise(
        tuple(pages),
        tuple(_mixture(world, {p.id for p in pages}, questions, absent, across, rng)),
    )


def _small_world(
    rng: random.Random,
    k: int,
    split: Split,
    *,
    plain: bool,
    sizes: Sequence[int],
    dependent: float,
    strange: bool,
) -> World:
    head = rng.choice(KINDS)
    chain = rng.choice(bridges_of(head, plain=plain))
    spare = 1 + k // 4
    share = rng.choice((0.5, 0.3)) if rng.random() < dependent else 0.0
    if rng.random() < 0.2 or k < 2:
        table = head if dependent and rng.random() < 0.15 else ""
        counts = {head: k + spare}
        return Builder(
            rng,
            split,
            counts,
            dependent=share,
            table=table,
            plain=plain,
            sizes=sizes,
            strange=strange,
        ).build()
    counts = {head: (k + 1) // 2 + spare}
    counts[chain.value] = counts.get(chain.value, 0) + k // 2 + spare
    return Builder(
        rng,
        split,
        counts,
        chain=chain,
        linked=rng.choice((0.2, 0.6)),
        dependent=share,
        plain=plain,
        sizes=sizes,
        strange=strange,
    ).build()


def _choose(pages: list[Page], k: int, rng: random.Random) -> list[Page]:
    """About k pages in random order; a page that continues another stands right after it, a
    header first.
    """
    units = [[p, *(q for q in pages if q.after == p.id)] for p in pages if not p.after]
    rng.shuffle(units)
    units.sort(key=lambda unit: unit[0].id != "table")
    chosen: list[Page] = []
    for unit in units:
        if len(chosen) + len(unit) <= k:
            chosen += unit
    return chosen


def dependent(
    world: World, k: int, dependence: Dependence, rng: random.Random
) -> tuple[Question, tuple[Page, ...]] | None:
    """One question whose answer hangs on another page as `dependence` says, and k of the world's
    pages in prompt order; None where the drawn pages hold no such question, or are not k.
    """
    pages = _choose(list(world.pages.values()), k, rng)
    found = _answered(world, {page.id for page in pages}, rng)
    across = [question for question in found if question.dependence == dependence]
    return (rng.choice(across), tuple(pages)) if across and len(pages) == k else None


def _answered(world: World, here: Collection[str], rng: random.Random) -> list[Question]:
    """A one-hop question for each fact whose gold pages are all in `here`."""
    asked = (one_hop(world, fact, rng) for fact, page in world.stated.values() if page in here)
    return [question for question in asked if set(question.gold) <= set(here)]


def _mixture(
    world: World,
    here: Collection[str],
    n: int,
    absent: float,
    across: float,
    rng: random.Random,
) -> list[Question]:
    """Up to n questions: about 2 in 5 one-hop, 2 in 5 two-hop where the pages allow it, the rest
    absent.
    """
    ones = _answered(world, here, rng)
    twos = [two_hop(world, a, b, rng) for a, b in _sample(list(two_hop_facts(world)), 40, rng)]
    twos = [q for q in twos if set(q.gold) <= set(here)]
    none = list(absent_questions(world, here, rng))
    hanging = [q for q in ones if q.dependence]
    picked = (
        _sample(twos, n * 2 // 5, rng)
        + _sample(none, round(n * absent), rng)
        + _sample(hanging, int(n * across), rng)
    )
    picked += _sample([q for q in ones if q not in picked], n - len(picked), rng)
    rng.shuffle(picked)
    return picked


def absent_questions(world: World, here: Collection[str], rng: random.Random) -> Iterator[Question]:
    """Questions whose fact no page in `here` states: the page, the fact, or one of two hops is
    missing.
    """
    for fact, page in world.stated.values():
        yield from absent_around(world, fact, page, here, rng)


def absent_around(
    world: World, fact: Fact, page: str, here: Collection[str], rng: random.Random
) -> Iterator[Question]:
    """The absent questions that start from one stated fact and its page."""
    gone, value = page not in here, fact.value
    if gone and not fact.same_as:
        yield absent_one_hop(fact.subject, fact.relation, (page,), rng)
    if not gone and rng.random() < 0.1:
        relation = rng.choice(relations_of(fact.subject.kind, plain=world.plain))
        if world.find(fact.subject, relation) is None:
            yield absent_one_hop(fact.subject, relation, (), rng)
    if fact.relation.descriptions and isinstance(value, Entity) and _outright(world, fact, page):
        relation = rng.choice(relations_of(value.kind, plain=world.plain))
        second = world.find(value, relation)
        if gone and rng.random() < 0.5:
            yield absent_two_hop(world, fact, relation, "first", rng)
        if not gone and (second is None or second[1] not in here) and rng.random() < 0.4:
            yield absent_two_hop(world, fact, relation, "second", rng)


def _sample(items: list[_T], n: int, rng: random.Random) -> list[_T]:
    return rng.sample(items, max(0, min(n, len(items))))


def _outright(world: World, fact: Fact, page: str) -> bool:
    return fact.same_as is None and world.pages[page].dependence in ("", "same")


def _ask(relation: Relation, subject: str, rng: random.Random) -> str:
    template = rng.choice((*relation.questions, rng.choice(generic_questions(relation))))
    return template.format(s=subject)


def _describe(fact: Fact, rng: random.Random) -> str:
    return rng.choice(fact.relation.descriptions).format(s=fact.subject.mention)


def _whose(bridge: Entity, relation: Relation, answer: str) -> str:
    return f"{bridge.name}, whose {relation.role} is {answer}"
