"""A prompt that fits as text fits with its passages recognised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, Passage, Text
from kvlink_rag.errors import PromptTooLong

TITLE = "A title that is a good deal longer than the text " * 2


@pytest.fixture
def model(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> KVLinkModel:
    model = make_model("llama", torch.float32)
    monkeypatch.setattr(model, "format", replace(model.format, window=1000))
    monkeypatch.setattr(model, "end_ids", frozenset())  # answers take all the room there is
    return model


@pytest.fixture
def documents() -> list[Document]:
    return [Document(f"Fact number {i} of many facts.", title=TITLE, id=str(i)) for i in range(8)]


@pytest.fixture
def rag(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, documents: list[Document]
) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        rag.register(documents)
        yield rag


def prompt(documents: list[Document]) -> str:
    return "\n\n".join(document.text for document in documents) + "\n\nQuestion: which?"


def test_passages_that_do_not_fit_stay_text(rag: KVLinkRAG, documents: list[Document]) -> None:
    stream = rag.complete(prompt(documents), max_new_tokens=20)
    said = "".join(stream)
    passages = stream.trace.passages
    assert 0 < passages < 8
    assert stream.trace.generated_tokens == 20  # the answer has its room
    # one more would not have fitted: 98 + 2 characters of header, 5 link tokens
    total = stream.trace.reused_tokens + stream.trace.computed_tokens
    assert 1000 - 20 - 105 < total <= 1000 - 20
    parts = rag.recognise_chat([{"role": "user", "content": prompt(documents)}])
    kept = [p for p in parts if isinstance(p, Passage)][:passages]
    oracle = [p if isinstance(p, Text) or p in kept else Text(p.document.text) for p in parts]
    assert said == rag.model.generate(oracle, mode="masked", max_new_tokens=20)


def test_where_text_leaves_less_room_that_is_enough(
    rag: KVLinkRAG, documents: list[Document]
) -> None:
    stream = rag.complete(prompt(documents), max_new_tokens=5000)
    as_text = len(
        rag.model.layout(rag.model.chat([{"role": "user", "content": prompt(documents)}]))
    )
    assert len("".join(stream)) > 0
    assert stream.trace.generated_tokens >= 1000 - as_text
    assert stream.trace.passages == 0


def test_what_fits_is_left_alone(rag: KVLinkRAG, documents: list[Document]) -> None:
    stream = rag.complete(prompt(documents[:5]), max_new_tokens=20)
    assert "".join(stream)
    assert stream.trace.passages == 5


def test_passages_of_the_caller_stay_and_may_be_too_many(
    rag: KVLinkRAG, documents: list[Document]
) -> None:
    content = [*(Passage(document) for document in documents), Text("Which?")]
    with pytest.raises(PromptTooLong):
        next(rag.complete([{"role": "user", "content": content}], max_new_tokens=20))


def test_a_prompt_too_long_as_text_is_refused(rag: KVLinkRAG, documents: list[Document]) -> None:
    with pytest.raises(PromptTooLong):
        next(rag.complete("long " * 300 + prompt(documents)))


def test_passages_without_room_are_told(
    rag: KVLinkRAG, documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    stream = rag.complete(prompt(documents), max_new_tokens=20)
    list(stream)
    as_text = stream.trace.passages_as_text
    assert as_text == 8 - stream.trace.passages > 0
    assert f"{as_text} of the 8 passages recognised are computed as text" in caplog.text
    assert "link tokens for" not in caplog.text
    caplog.clear()
    list(stream := rag.complete(prompt(documents[:5]), max_new_tokens=20))
    assert (stream.trace.passages_as_text, caplog.text) == (0, "")
