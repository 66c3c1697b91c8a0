"""The generator: what is asked can be read from the pages, what is absent cannot, names stay
apart.
"""

from __future__ import annotations

import random
import re

import pytest

from kvlink_rag.datasets.answers import ABSENT, final_answer
from kvlink_rag.training.evaluate_small import held_out
from kvlink_rag.training.facts import KINDS, RELATIONS
from kvlink_rag.training.names import GIVEN, Names, split_of
from kvlink_rag.training.questions import Exercise, exercise
from kvlink_rag.training.retriever import large_world
from kvlink_rag.training.world import Builder


def tasks(n: int = 60, k: int = 10) -> list[Exercise]:
    return [exercise(random.Random(f"test-{i}"), k) for i in range(n)]


def test_the_same_seed_gives_the_same_exercise() -> None:
    assert exercise(random.Random(5), 10) == exercise(random.Random(5), 10)
    assert exercise(random.Random(5), 10) != exercise(random.Random(6), 10)


def test_exercises_hold_all_kinds_of_questions_and_of_dependence() -> None:
    questions = [q for task in tasks(150) for q in task.questions]
    assert {q.kind for q in questions} == {"one-hop", "two-hop", "absent"}
    assert {q.dependence for q in questions} == {"", "continued", "same", "table"}


def test_final_answers_stand_in_the_gold_pages() -> None:
    for task in tasks():
        texts = {page.id: page.text.lower() for page in task.pages}
        for question in task.questions:
            if question.kind == "absent":
                continue
            assert set(question.gold) <= set(texts)
            assert any(final_answer(question.answer) in texts[i] for i in question.gold)


def test_a_two_hop_question_needs_both_pages_and_never_names_its_bridge() -> None:
    seen = 0
    for task in tasks():
        texts = {page.id: page.text for page in task.pages}
        for question in task.questions:
            if question.kind == "two-hop":
                seen += 1
                bridge = question.answer.split(", whose ")[0]
                first, second = (texts[i] for i in question.gold)
                assert len(set(question.gold)) == 2
                assert bridge in first
                assert bridge in second
                assert bridge not in question.text
    assert seen > 100


def test_what_absent_questions_ask_is_not_in_the_context() -> None:
    """Read from the text alone: no page of the context is about what the question asks for."""
    seen = 0
    for asked in held_out(250, k=10):
        question, subject = asked.question, re.search(r"[A-Z]\w+ [A-Z]\w+", asked.question.text[5:])
        if question.kind != "absent" or len(question.kinds) > 1 or subject is None:
            continue
        seen += 1
        assert question.answer == ABSENT
        assert not any(page.text.startswith(subject.group()) for page in asked.pages)
        assert not any(page.title == subject.group() for page in asked.pages)
    assert seen > 5


def test_contexts_hold_the_gold_pages_among_distractors_of_the_same_kinds() -> None:
    for asked in held_out(100, k=10):
        ids = {page.id for page in asked.pages}
        assert len(asked.pages) == len(ids) == 10
        assert set(asked.question.gold) <= ids
        assert not set(asked.question.missing) & ids
        assert {page.about.kind for page in asked.pages if page.about} == set(asked.question.kinds)


def test_a_continuation_follows_its_page_and_a_header_comes_first() -> None:
    seen = 0
    for task in tasks(150):
        ids = [page.id for page in task.pages]
        for at, page in enumerate(task.pages):
            if page.after:
                seen += 1
                assert ids[at - 1] == page.after
                assert page.about is not None
                assert page.about.name not in page.text
        assert "table" not in ids[1:]
    assert seen > 10


def test_names_of_the_two_splits_are_disjoint() -> None:
    words = {split: _words(split) for split in ("train", "heldout")}
    assert not words["train"] & words["heldout"]
    for split, names in words.items():
        assert all(split_of(word) == split for word in names)


def _words(split: str) -> set[str]:
    names = Names(random.Random(split), split)  # type: ignore[arg-type]
    return {names.word(kind) for kind in ("family", "town", "river") for _ in range(150)}


def test_held_out_worlds_use_held_out_names_only() -> None:
    world = large_world(random.Random(0), "heldout", 60)
    fixed = {w for r in RELATIONS for s in r.statements for w in re.findall(r"[A-Z][a-z]+", s)}
    fixed |= {"Project", "Labs", "Works", "Group", "Brothers", "Museum", "The", "His", "Her", "Its"}
    fixed |= {"He", "She", "It", *GIVEN["she"], *GIVEN["he"]}
    words = {
        w
        for p in world.pages.values()
        for w in re.findall(r"\b[A-Z][a-z]+", p.title + " " + p.text)
    }
    assert all(split_of(word) == "heldout" for word in words - fixed)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Marnik", "marnik"),
        (" Marnik.\n", "marnik"),
        ("Ann Bell, whose birthplace is Marnik.", "marnik"),
        ("The documents do not say", "the documents do not say"),
        ("Ann Bell, whose home the documents do not say.", "the documents do not say"),
        ("", ""),
    ],
)
def test_final_answer(text: str, wanted: str) -> None:
    assert final_answer(text) == wanted


def test_pages_have_several_facts_and_varied_lengths() -> None:
    world = Builder(random.Random(1), "train", dict.fromkeys(KINDS, 20)).build()
    lengths = {len(page.text.split()) for page in world.pages.values()}
    assert min(lengths) < 12
    assert max(lengths) > 25
    assert sum(len(page.facts) for page in world.pages.values()) > 2.5 * len(world.pages)
