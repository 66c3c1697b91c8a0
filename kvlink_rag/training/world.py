"""Generated knowledge bases in plain English: pages about invented things, and questions over
them.

A world is a graph of entities; each entity has a page that states some of its facts. One-hop
questions ask for a fact of one page; two-hop questions describe the subject through a fact of
another page ("the leader of Project Velmora"), and their answers name that bridge first: `Ann
Bell, whose birthplace is Marnik`. Some worlds hold pages that depend on each other: a page that
continues the one before, "the same birthplace as", table rows whose header is a page of its own.
Knows nothing about tokens, prompts or models.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .facts import (
    VALUES,
    Relation,
    relations_of,
)
from .names import Names, Split

Dependence = Literal["", "continued", "same", "table"]

SIZES = (2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5)  # facts of a page, drawn evenly
_PRONOUNS = (("she", "her"), ("he", "his"))
_PLURALS = {"person": "people", "company": "companies"}
_COMPANY_FORMS = ("{} Labs", "{} Works", "{} Group", "{} Brothers")
_PRODUCT_FORMS = ("{} lamp", "{} kettle", "{} drill", "{} radio", "{} stove", "{} bicycle")
_FORMS = {
    "project": ("Project {}",),
    "company": _COMPANY_FORMS,
    "product": _PRODUCT_FORMS,
    "museum": ("{} Museum",),
}


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing with a name; `subject` and `possessive` are its pronouns."""

    kind: str
    name: str
    subject: str = "it"
    possessive: str = "its"

    @property
    def mention(self) -> str:
        """The name as it stands inside a sentence."""
        return f"the {self.name}" if self.kind in ("product", "museum") else self.name


@dataclass(frozen=True, slots=True)
class Fact:
    """`relation` of `subject` is `value`; `same_as` if the page says so by pointing at another
    entity.
    """

    subject: Entity
    relation: Relation
    value: Entity | str
    same_as: Entity | None = None

    @property
    def answer(self) -> str:
        return self.value.name if isinstance(self.value, Entity) else self.value


@dataclass(frozen=True, slots=True)
class Page:
    """One passage: its facts, and how it depends on others (`after`: the page it must directly
    follow).
    """

    id: str
    title: str
    text: str
    about: Entity | None
    facts: tuple[Fact, ...]
    dependence: Dependence = ""
    after: str | None = None
    header: str | None = None


@dataclass(slots=True)
class World:
    """All pages of one knowledge base, by id, with the facts that they state. In a plain world
    each relation has one phrasing only.
    """

    plain: bool = False
    pages: dict[str, Page] = field(default_factory=dict)
    stated: dict[tuple[str, str], tuple[Fact, str]] = field(default_factory=dict)

    def add(self, page: Page) -> None:
        self.pages[page.id] = page
        for fact in page.facts:
            self.stated[fact.subject.name, fact.relation.role] = (fact, page.id)

    def find(self, subject: Entity, relation: Relation) -> tuple[Fact, str] | None:
        """The stated fact and the id of its page, or None."""
        return self.stated.get((subject.name, relation.role))


class Builder:
    """Builds one world from a random generator: `counts` pages of each kind, linked among
    themselves.

    `linked` is the chance that a fact's value is an entity which has a page of its own; a fact
    of a `chain` relation always has one where there is one. `dependent` is the share of pages
    made to depend on others. `sizes` are the numbers of facts that a page may have; `strange` as
    in `Names`.
    """

    def __init__(
        self,
        rng: random.Random,
        split: Split,
        counts: Mapping[str, int],
        *,
        linked: float = 0.5,
        chain: Relation | None = None,
        dependent: float = 0.0,
        table: str = "",
        plain: bool = False,
        sizes: Sequence[int] = SIZES,
        strange: bool = False,
    ) -> None:
        self.rng, self.names = rng, Names(rng, split, strange=strange)
        self.linked, self.chain, self.dependent = linked, chain, dependent
        self.table, self.plain, self.sizes = table, plain, sizes
        self._families: list[str] = []
        self._taken: set[str] = set()
        self._sources: set[Fact] = set()
        self.entities = {kind: [self.entity(kind) for _ in range(n)] for kind, n in counts.items()}

    def build(self) -> World:
        world = World(self.plain)
        drafts = {
            entity: self._facts(entity)
            for entities in self.entities.values()
            for entity in entities
        }
        columns = self._columns(world)
        for entity, facts in drafts.items():
            for page in self._pages(entity, facts, drafts, columns):
                world.add(page)
        return world

    # -- entities and values

    def entity(self, kind: str) -> Entity:
        if kind == "person":
            return self._person()
        form = self.rng.choice(_FORMS.get(kind, ("{}",)))
        return Entity(kind, form.format(self.names.word(kind)))

    def _person(self) -> Entity:
        pronouns = self.rng.choice(_PRONOUNS)
        while (name := f"{self.names.given(pronouns[0])} {self._family()}") in self._taken:
            pass
        self._taken.add(name)
        return Entity("person", name, *pronouns)

    def _family(self) -> str:
        """A family name; one in eight is shared with somebody else of the world."""
        pool = self._families
        if pool and (self.rng.random() < 0.12 or len(pool) > 400):
            return self.rng.choice(pool)
        pool.append(self.names.word("family"))
        return pool[-1]

    def _value(self, subject: Entity, relation: Relation) -> Entity | str:
        rng, kind = self.rng, relation.value
        if kind == "year":
            return str(rng.randint(1850, 2024))
        if kind == "price":
            return f"{rng.randint(11, 999)} crowns"
        if kind in VALUES:
            return rng.choice(VALUES[kind])
        if kind in ("river", "region"):
            return self.names.word(kind)
        others = [e for e in self.entities.get(kind, []) if e is not subject]
        if others and (relation is self.chain or rng.random() < self.linked):
            return rng.choice(others)
        return self.entity(kind)

    def _facts(self, entity: Entity) -> list[Fact]:
        relations = list(relations_of(entity.kind, plain=self.plain))
        self.rng.shuffle(relations)
        kept = relations[: self.rng.choice(self.sizes)]
        if self.chain in relations and self.chain not in kept and self.chain is not None:
            kept[self.rng.randrange(len(kept))] = self.chain
        return [Fact(entity, relation, self._value(entity, relation)) for relation in kept]

    # -- pages

    def _pages(
        self,
        entity: Entity,
        facts: list[Fact],
        drafts: Mapping[Entity, list[Fact]],
        columns: Sequence[Relation],
    ) -> Iterable[Page]:
        if entity.kind == self.table:
            yield self._row(entity, columns)
        elif self.rng.random() >= self.dependent:
            yield self._plain(entity, facts)
        elif len(facts) > 2 and self.rng.random() < 0.5:
            yield from self._continued(entity, facts)
        else:
            yield self._same(entity, facts, drafts)

    def _plain(self, entity: Entity, facts: Sequence[Fact], dependence: Dependence = "") -> Page:
        title = entity.name if self.rng.random() < 0.7 else ""
        return Page(
            _slug(entity), title, self._prose(entity, facts), entity, tuple(facts), dependence
        )

    def _continued(self, entity: Entity, facts: list[Fact]) -> Iterable[Page]:
        """Two pages; the second names its subject by pronoun only and must follow the first."""
        first = self._plain(entity, facts[:-1])
        sentence = _sentence(self.rng, facts[-1], named=False)
        yield first
        yield Page(
            f"{first.id}-2",
            "",
            f"Continued. {sentence}",
            entity,
            (facts[-1],),
            "continued",
            first.id,
        )

    def _same(self, entity: Entity, facts: list[Fact], drafts: Mapping[Entity, list[Fact]]) -> Page:
        """One fact is stated as the same as that of another entity of this kind, whose page
        states it.
        """
        for index, fact in enumerate(facts):
            source = self._source(entity, fact, drafts)
            if source is not None and fact not in self._sources:
                self._sources.add(source)
                facts[index] = Fact(entity, fact.relation, source.value, source.subject)
                return self._plain(entity, facts, "same")
        return self._plain(entity, facts)

    def _source(
        self, entity: Entity, fact: Fact, drafts: Mapping[Entity, list[Fact]]
    ) -> Fact | None:
        """A fact of the same relation that another page states outright."""
        if entity.kind == self.table:
            return None
        others = [twin for twin in self.entities[entity.kind] if twin is not entity]
        found = (
            f
            for twin in others
            for f in drafts[twin]
            if f.relation is fact.relation and not f.same_as
        )
        return next(found, None)

    def _columns(self, world: World) -> Sequence[Relation]:
        """The columns of the world's table; its header becomes a page of its own."""
        if not self.table:
            return ()
        columns = self.rng.sample(relations_of(self.table, plain=self.plain), 3)
        heads = ", ".join(relation.role for relation in columns)
        plural = _PLURALS.get(self.table, f"{self.table}s")
        world.add(
            Page("table", "", f"Table of {plural}. Columns: name, {heads}.", None, (), "table")
        )
        return columns

    def _row(self, entity: Entity, columns: Sequence[Relation]) -> Page:
        facts = tuple(Fact(entity, relation, self._value(entity, relation)) for relation in columns)
        text = ", ".join((entity.name, *(fact.answer for fact in facts))) + "."
        return Page(_slug(entity), "", text, entity, facts, "table", header="table")

    def _prose(self, entity: Entity, facts: Sequence[Fact]) -> str:
        """Sentences that name the subject in the first and mostly use pronouns after it."""
        named = [index == 0 or self.rng.random() < 0.35 for index in range(len(facts))]
        return " ".join(_sentence(self.rng, f, named=n) for f, n in zip(facts, named, strict=True))


def _sentence(rng: random.Random, fact: Fact, *, named: bool) -> str:
    """One fact as a sentence. Things are only called "it" where that starts the sentence."""
    subject, template = fact.subject, rng.choice(fact.relation.statements)
    if not named and subject.kind != "person" and not template.startswith(("{s}", "{p}")):
        template = fact.relation.statements[0]
    who = subject.mention if named else subject.subject
    whose = f"{subject.mention}'s" if named else subject.possessive
    if fact.same_as is not None:
        template = f"{{p}} {fact.relation.role} is the same as that of {fact.same_as.mention}."
    return _upper(template.format(s=who, p=whose, o=_say(fact)))


def _say(fact: Fact) -> str:
    return fact.value.mention if isinstance(fact.value, Entity) else fact.value


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(entity: Entity) -> str:
    return entity.name.lower().replace(" ", "-")
