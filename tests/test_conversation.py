"""Conversations: what stays in the prompt, what is forgotten, and that reuse stays exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import MAX_PASSAGES, ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.collection.conversation import Conversation
from kvlink_rag.errors import PromptTooLong

TOWNS = ["Orvale", "Marnik", "Teldon", "Brisk", "Quill", "Sarno", "Velt", "Hux"]


@pytest.fixture
def rag(tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder) -> Iterator[KVLinkRAG]:
    model = make_model("llama", torch.float32)
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        rag.add([Document(f"{t} has a harbour.", title=t, id=t) for t in TOWNS])
        yield rag


def said(conversation: Conversation, question: str, **options: object) -> tuple[str, list[str]]:
    turn = conversation.ask(question, max_new_tokens=6, **options)
    text = "".join(turn)
    assert text == turn.text != ""
    return text, [str(hit.document.id) for hit in turn.hits]


def test_passages_by_id(rag: KVLinkRAG) -> None:
    conversation = Conversation(rag, k=4, order="id")
    turn = conversation.ask("Has Velt a harbour?", max_new_tokens=3)
    list(turn)
    found = [hit.document.id for hit in turn.hits]
    laid = [part.document.id for part in turn.message()["content"][:-1]]
    assert found[0] == "Velt"
    assert laid == sorted(found) != found


def test_passages_are_not_repeated_and_numbers_count_on(rag: KVLinkRAG) -> None:
    conversation = Conversation(rag, k=3)
    seen: list[str] = []
    for question in ("Has Orvale a harbour?", "And Marnik?", "And Teldon?"):
        turn = conversation.ask(question, max_new_tokens=3)
        list(turn)
        assert turn.first_number == len(seen) + 1
        seen += [str(hit.document.id) for hit in turn.hits]
    assert len(seen) == len(set(seen)) >= 4
    assert {"Orvale", "Marnik", "Teldon"} <= set(seen)


@pytest.mark.parametrize("mode", ["masked", "reuse"])
def test_every_turn_is_as_a_masked_prefill_has_it(rag: KVLinkRAG, mode: str) -> None:
    questions = ("Has Orvale a harbour?", "And Marnik?", "Which town is Brisk?")
    oracle = Conversation(rag, k=2)
    expected = [said(oracle, question, mode="masked") for question in questions]
    other = Conversation(rag, k=2)
    assert [said(other, question, mode=mode) for question in questions] == expected


def test_a_later_turn_keeps_what_was_computed(rag: KVLinkRAG) -> None:
    conversation = Conversation(rag, k=2)
    first, second = conversation.ask("Orvale?", max_new_tokens=3), conversation.ask("Velt?")
    list(first)
    next(second)
    assert first.trace.prefix_tokens == 0
    assert second.trace.prefix_tokens > 0
    assert second.trace.passages > first.trace.passages


def test_a_follow_up_finds_what_the_last_question_named(rag: KVLinkRAG) -> None:
    rag.add([Document("Its mayor is Ann Bell.", title="Orvale mayor", id="mayor")])
    rag.add([Document("The mayor is Tim Dale.", title="Marnik mayor", id="other")])
    conversation = Conversation(rag, k=1)
    assert said(conversation, "Has Orvale a harbour?")[1] == ["Orvale"]
    assert "other" in {hit.document.id for hit in rag.search("Who is the mayor?", 1)}
    conversation = Conversation(rag, k=2)
    said(conversation, "Has Orvale a harbour?")
    assert "mayor" in {hit.document.id for hit in conversation.hits("Who is its mayor?")}


def test_the_oldest_turns_are_forgotten_when_slots_run_out(rag: KVLinkRAG) -> None:
    rag.add([Document(f"Lamp {n} is red.", id=f"lamp-{n}") for n in range(MAX_PASSAGES)])
    conversation = Conversation(rag, k=MAX_PASSAGES // 2)
    for question in ("Lamp 1?", "Lamp 2?", "Lamp 3?"):
        _, ids = said(conversation, question)
    assert ids


def test_a_question_longer_than_the_window_is_refused(rag: KVLinkRAG) -> None:
    with pytest.raises(PromptTooLong):
        said(Conversation(rag, k=1), "x" * (rag.model.window + 1))
