"""Search by vector, with a filter, and stored vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.errors import ConfigError, DocumentNotFound

WORDS = ["anchor", "bridge", "castle", "dune", "ferry", "gate", "harbour", "island"]


@pytest.fixture
def rag(tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "c", model=make_model(), embedder=embedder) as rag:
        rag.add(
            Document(f"An {word} of stone, number {n}.", id=word, metadata={"n": n, "odd": n % 2})
            for n, word in enumerate(WORDS)
        )
        yield rag


def ids(hits: list) -> list[str]:  # type: ignore[type-arg]
    return [hit.document.id for hit in hits]


def test_by_vector_is_by_question(rag: KVLinkRAG, embedder: WordEmbedder) -> None:
    question = "Where is the castle of stone?"
    vector = embedder.embed_queries([question])[0]
    assert rag.search_vector(vector, 5) == rag.search(question, 5)
    assert len(rag.search_vector(vector, 100)) == len(WORDS)


def test_a_filter_looks_behind_the_nearest(rag: KVLinkRAG) -> None:
    """The filtered hits are those of the whole ranking, however far down they stand."""
    everything = rag.search("the ferry", 100)
    last = everything[-1].document.id
    assert ids(rag.search("the ferry", 1, where=lambda d: d.id == last)) == [last]
    odd = [hit for hit in everything if hit.document.metadata["odd"]]
    assert rag.search("the ferry", 2, where=lambda d: bool(d.metadata["odd"])) == odd[:2]
    assert rag.search("the ferry", 100, where=lambda d: bool(d.metadata["odd"])) == odd
    assert rag.search("the ferry", 3, where=lambda d: False) == []


def test_a_filter_holds_in_the_second_round(rag: KVLinkRAG) -> None:
    found = rag.search("the ferry", 6, rounds=2, where=lambda d: d.metadata["odd"] == 0)
    assert sorted(hit.document.metadata["n"] for hit in found) == [0, 2, 4, 6]


def test_stored_vectors_are_the_embedders(rag: KVLinkRAG, embedder: WordEmbedder) -> None:
    wanted = ["gate", "anchor", "gate"]
    texts = [document.text for document in rag.get(wanted)]
    np.testing.assert_array_equal(rag.vectors(wanted), embedder.embed(texts))
    assert rag.vectors([]).shape == (0, embedder.dimension)


def test_what_is_not_there(rag: KVLinkRAG, embedder: WordEmbedder) -> None:
    rag.register([Document("Registered only.", id="registered")])
    for id in ("registered", "nowhere"):
        with pytest.raises(DocumentNotFound, match=id):
            rag.vectors(["gate", id])
    with pytest.raises(DocumentNotFound, match="nowhere"):
        rag.get(["gate", "nowhere"])
    assert [d.id for d in rag.get(["nowhere", "gate"], missing_ok=True)] == ["gate"]
    assert rag.delete(["nowhere", "gate"], missing_ok=True) == 1
    assert rag.delete(["gate"], missing_ok=True) == 0
    with pytest.raises(ConfigError, match="k is 0"):
        rag.search_vector(embedder.embed_queries(["x"])[0], 0)
    with pytest.raises(ConfigError, match="expected one that the index holds"):
        rag.index.vectors([10_000])


def test_an_empty_collection(tmp_path: Path, make_model: ModelMaker) -> None:
    embedder = WordEmbedder()
    with KVLinkRAG.open(tmp_path / "empty", model=make_model(), embedder=embedder) as rag:
        assert rag.search_vector(embedder.embed(["x"])[0], 3) == []
        assert rag.search("x", 3, where=lambda d: True) == []


@pytest.mark.parametrize("k", [2.5, True, "3", None])
def test_what_is_no_number_of_hits(k: object, rag: KVLinkRAG) -> None:
    with pytest.raises(ConfigError, match="expected a whole number of at least 1"):
        rag.search("Orvale", k)  # type: ignore[arg-type]


def test_the_first_vectors_may_come_from_another_process_in_the_middle(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        real = rag.parts.index._dimension

        def meanwhile() -> int:
            found = real()
            monkeypatch.setattr(rag.parts.index, "_dimension", real)
            with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as other:
                other.add([Document("a mill by a river", id="mill")])
            return found

        monkeypatch.setattr(rag.parts.index, "_dimension", meanwhile)
        assert [hit.document.id for hit in rag.search("mill", 3)] == ["mill"]
        assert rag.check() == []
