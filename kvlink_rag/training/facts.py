"""The schema of the generated worlds: kinds of things, their relations, and how English says
them.

Data only: no names, no randomness. In a phrase `{s}` is the subject, `{p}` its possessive ("Ann
Bell's", "her"), `{o}` the value. A sentence's first letter is capitalised by whoever fills it
in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Relation:
    """One attribute of a kind: what it is called, what it holds, how it is stated, asked and
    described.
    """

    subject: str
    role: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    descriptions: tuple[str, ...] = ()


VALUES: dict[str, tuple[str, ...]] = {
    "instrument": (
        "oboe",
        "harp",
        "cello",
        "flute",
        "drums",
        "organ",
        "lute",
        "horn",
        "piano",
        "banjo",
        "violin",
        "trumpet",
    ),
    "aim": (
        "clean water",
        "cheap batteries",
        "quiet engines",
        "safe bridges",
        "warm houses",
        "early flood warnings",
        "better maps",
        "faster trains",
        "lighter tents",
        "dry roads",
        "healthy bees",
        "stronger glass",
    ),
    "trade": (
        "paper",
        "glass",
        "clocks",
        "pumps",
        "ropes",
        "boats",
        "bricks",
        "lenses",
        "carpets",
        "paint",
        "bicycles",
        "tea",
    ),
    "speciality": (
        "cheese",
        "honey",
        "bread",
        "cider",
        "soup",
        "plums",
        "butter",
        "pancakes",
        "salt",
        "mustard",
        "walnuts",
        "sausages",
    ),
    "material": (
        "steel",
        "oak",
        "copper",
        "bamboo",
        "leather",
        "wool",
        "plastic",
        "brass",
        "clay",
        "cork",
        "silk",
        "tin",
    ),
    "collection": (
        "coins",
        "masks",
        "stamps",
        "maps",
        "swords",
        "clocks",
        "fossils",
        "dolls",
        "shells",
        "posters",
        "kites",
        "bells",
    ),
}

_R = Relation
RELATIONS: tuple[Relation, ...] = (
    _R(
        "person",
        "birthplace",
        "town",
        ("{s} was born in {o}.", "{p} birthplace is {o}.", "{s} comes from {o}."),
        ("Where was {s} born?", "In which town was {s} born?", "Which town does {s} come from?"),
        ("the birthplace of {s}", "the town where {s} was born"),
    ),
    _R(
        "person",
        "home",
        "town",
        ("{s} lives in {o}.", "{p} home is in {o}.", "Today {s} has a house in {o}."),
        ("Where does {s} live?", "In which town does {s} live?", "Where is the home of {s}?"),
        ("the home of {s}", "the town where {s} lives"),
    ),
    _R(
        "person",
        "employer",
        "company",
        ("{s} works for {o}.", "{p} employer is {o}.", "{s} has a job at {o}."),
        ("Who employs {s}?", "Which company does {s} work for?", "Where does {s} work?"),
        ("the employer of {s}", "the company that {s} works for"),
    ),
    _R(
        "person",
        "teacher",
        "person",
        ("{s} was taught by {o}.", "{p} teacher was {o}.", "{s} learned the trade from {o}."),
        ("Who taught {s}?", "Who was the teacher of {s}?"),
        ("the teacher of {s}", "the person who taught {s}"),
    ),
    _R(
        "person",
        "instrument",
        "instrument",
        (
            "{s} plays the {o}.",
            "{p} instrument is the {o}.",
            "In the evening {s} practises the {o}.",
        ),
        ("What does {s} play?", "Which instrument does {s} play?"),
    ),
    _R(
        "person",
        "birth year",
        "year",
        ("{s} was born in the year {o}.", "{p} birth year is {o}."),
        ("When was {s} born?", "In which year was {s} born?"),
    ),
    _R(
        "project",
        "leader",
        "person",
        ("{s} is led by {o}.", "{p} leader is {o}.", "{s} is run by {o}."),
        ("Who leads {s}?", "Who runs {s}?", "Who is in charge of {s}?"),
        ("the leader of {s}", "the person who leads {s}"),
    ),
    _R(
        "project",
        "sponsor",
        "company",
        ("{s} is paid for by {o}.", "{p} sponsor is {o}.", "The money for {s} comes from {o}."),
        ("Who pays for {s}?", "Which company sponsors {s}?"),
        ("the sponsor of {s}", "the company that pays for {s}"),
    ),
    _R(
        "project",
        "site",
        "town",
        ("{s} is based in {o}.", "{p} site is in {o}.", "The work on {s} is done in {o}."),
        ("Where is {s} based?", "In which town is {s} based?"),
        ("the site of {s}", "the town where {s} is based"),
    ),
    _R(
        "project",
        "start",
        "year",
        ("{s} began in {o}.", "{p} start was in {o}.", "Work on {s} started in {o}."),
        ("When did {s} begin?", "In which year did {s} start?"),
    ),
    _R(
        "project",
        "aim",
        "aim",
        ("{s} works on {o}.", "{p} aim is {o}.", "The goal of {s} is {o}."),
        ("What does {s} work on?", "What is the goal of {s}?"),
    ),
    _R(
        "company",
        "seat",
        "town",
        (
            "{s} has its head office in {o}.",
            "{p} seat is {o}.",
            "The head office of {s} stands in {o}.",
        ),
        ("Where is the head office of {s}?", "In which town does {s} have its head office?"),
        ("the seat of {s}", "the town where {s} has its head office"),
    ),
    _R(
        "company",
        "director",
        "person",
        ("{s} is directed by {o}.", "{p} director is {o}.", "{s} has {o} as director."),
        ("Who directs {s}?", "Who is the director of {s}?"),
        ("the director of {s}", "the person who directs {s}"),
    ),
    _R(
        "company",
        "owner",
        "company",
        ("{s} belongs to {o}.", "{p} owner is {o}.", "{s} is owned by {o}."),
        ("Who owns {s}?", "Which company does {s} belong to?"),
        ("the owner of {s}", "the company that owns {s}"),
    ),
    _R(
        "company",
        "founding year",
        "year",
        ("{s} was founded in {o}.", "{p} founding year is {o}."),
        ("When was {s} founded?", "In which year was {s} founded?"),
    ),
    _R(
        "company",
        "trade",
        "trade",
        ("{s} makes {o}.", "{p} trade is {o}.", "{s} earns its money with {o}."),
        ("What does {s} make?", "Which goods does {s} make?"),
    ),
    _R(
        "town",
        "mayor",
        "person",
        ("{s} is governed by {o}.", "{p} mayor is {o}.", "{s} has {o} as mayor."),
        ("Who governs {s}?", "Who is the mayor of {s}?"),
        ("the mayor of {s}", "the person who governs {s}"),
    ),
    _R(
        "town",
        "river",
        "river",
        ("{s} lies on the river {o}.", "{p} river is the {o}.", "Through {s} flows the river {o}."),
        ("Which river flows through {s}?", "On which river does {s} lie?"),
    ),
    _R(
        "town",
        "region",
        "region",
        ("{s} is part of {o}.", "{p} region is {o}.", "{s} lies in the region of {o}."),
        ("In which region does {s} lie?", "Which region is {s} part of?"),
    ),
    _R(
        "town",
        "speciality",
        "speciality",
        ("{s} is known for its {o}.", "{p} speciality is {o}.", "Visitors of {s} buy {o}."),
        ("What is {s} known for?", "What do visitors of {s} buy?"),
    ),
    _R(
        "product",
        "maker",
        "company",
        ("{s} is made by {o}.", "{p} maker is {o}.", "{s} is built by {o}."),
        ("Who makes {s}?", "Which company builds {s}?"),
        ("the maker of {s}", "the company that makes {s}"),
    ),
    _R(
        "product",
        "designer",
        "person",
        ("{s} was designed by {o}.", "{p} designer is {o}.", "The plans of {s} were drawn by {o}."),
        ("Who designed {s}?", "Who drew the plans of {s}?"),
        ("the designer of {s}", "the person who designed {s}"),
    ),
    _R(
        "product",
        "material",
        "material",
        ("{s} is made of {o}.", "{p} material is {o}.", "For {s} one needs {o}."),
        ("What is {s} made of?", "Which material is used for {s}?"),
    ),
    _R(
        "product",
        "price",
        "price",
        ("{s} costs {o}.", "{p} price is {o}.", "For {s} one pays {o}."),
        ("How much does {s} cost?", "What does one pay for {s}?"),
    ),
    _R(
        "museum",
        "town",
        "town",
        ("{s} stands in {o}.", "{p} town is {o}.", "To see {s} one travels to {o}."),
        ("Where does {s} stand?", "In which town is {s}?"),
        ("the town of {s}", "the town where {s} stands"),
    ),
    _R(
        "museum",
        "curator",
        "person",
        ("{s} is cared for by {o}.", "{p} curator is {o}.", "{s} has {o} as curator."),
        ("Who cares for {s}?", "Who is the curator of {s}?"),
        ("the curator of {s}", "the person who cares for {s}"),
    ),
    _R(
        "museum",
        "opening year",
        "year",
        ("{s} opened in {o}.", "{p} opening year is {o}."),
        ("When did {s} open?", "In which year did {s} open?"),
    ),
    _R(
        "museum",
        "collection",
        "collection",
        ("{s} shows {o}.", "{p} collection is of {o}.", "In {s} one finds old {o}."),
        ("What does {s} show?", "What does one find in {s}?"),
    ),
)

KINDS = ("person", "project", "company", "town", "product", "museum")


def generic_questions(relation: Relation) -> tuple[str, ...]:
    """Questions that any relation can be asked with."""
    word = "Who" if relation.value == "person" else "What"
    return (f"{word} is the {relation.role} of {{s}}?", f"Tell me the {relation.role} of {{s}}.")


def _plainly(relation: Relation) -> Relation:
    """Said, asked and described by its role only, so that the same words stand in all three."""
    descriptions = relation.descriptions[:1]
    return replace(
        relation, statements=relation.statements[1:2], questions=(), descriptions=descriptions
    )


_PLAIN = tuple(_plainly(relation) for relation in RELATIONS)


def relations_of(kind: str, *, plain: bool = False) -> tuple[Relation, ...]:
    """All relations whose subject is of this kind, in schema order; `plain` with one phrasing."""
    return tuple(r for r in (_PLAIN if plain else RELATIONS) if r.subject == kind)


def bridges_of(kind: str, *, plain: bool = False) -> tuple[Relation, ...]:
    """The relations of a kind whose value is itself a thing with relations: the first hops."""
    return tuple(relation for relation in relations_of(kind, plain=plain) if relation.descriptions)
