"""Embedding objects that are not ours: real ones of both frameworks, and plain look-alikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.errors import ConfigError, SettingsMismatch
from kvlink_rag.retrieval.framework_embedders import ForeignEmbedder, as_embedder

DOCS = [Document(f"{t} lies on the coast.", title=t, id=t) for t in ("Orvale", "Marnik", "Teldon")]
words = WordEmbedder()


class LangChainLike:
    """Vectors of any length, as an encoder that does not scale them would give."""

    model_name = "words-1"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [(words.embed([t])[0] * (1 + len(t))).tolist() for t in texts]

    def embed_query(self, text: str) -> list[float]:
        return words.embed([text])[0].tolist()


class LlamaIndexLike:
    def get_text_embedding_batch(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        return words.embed(texts).tolist()

    def get_query_embedding(self, query: str) -> list[float]:
        return words.embed([query])[0].tolist()


@pytest.mark.parametrize("made", [LangChainLike, LlamaIndexLike])
def test_a_collection_takes_it(tmp_path: Path, make_model: ModelMaker, made: type) -> None:
    model = make_model("llama", torch.float32)
    with KVLinkRAG.open(tmp_path, model=model, embedder=made()) as rag:
        rag.add(DOCS)
        assert [hit.document.id for hit in rag.search("Where is Marnik?", 1)] == ["Marnik"]
        assert rag.search("Orvale Orvale lies on the coast.", 1)[0].score == pytest.approx(1)
        assert made.__name__ in rag.stats().embedder
        assert rag.check() == []
    with KVLinkRAG.open(tmp_path, model=model, embedder=made()) as rag:
        assert [hit.document.id for hit in rag.search("Where is Teldon?", 1)] == ["Teldon"]
    other = made()
    other.model_name = "words-2"
    with pytest.raises(SettingsMismatch, match="embedder"):
        KVLinkRAG.open(tmp_path, model=model, embedder=other)


def test_vectors_are_scaled_and_questions_embedded_as_such() -> None:
    adapter = as_embedder(LangChainLike())
    assert adapter.dimension == 64
    vectors = adapter.embed(["a short text", "a text that is longer", ""])
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 64))
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths == pytest.approx([1, 1, 0])
    assert adapter.embed_queries(["a short text"])[0] == pytest.approx(vectors[0])
    assert adapter.embed([]).shape == adapter.embed_queries([]).shape == (0, 64)


def test_fingerprints_tell_classes_and_models_apart() -> None:
    def fingerprint(source: object, **fields: object) -> str:
        for name, value in fields.items():
            setattr(source, name, value)
        return as_embedder(source).fingerprint

    first = fingerprint(LangChainLike())
    assert first == fingerprint(LangChainLike(), client=object(), batch_size=7)
    others = [
        fingerprint(LangChainLike(), model_name="other"),
        fingerprint(LangChainLike(), dimensions=12),
        fingerprint(LangChainLike(), query_instruction="query: "),
        fingerprint(LlamaIndexLike()),
    ]
    assert len({first, *others}) == 5


def test_an_embedder_of_ours_is_taken_as_it_is() -> None:
    assert as_embedder(words) is words

    class Both(WordEmbedder, LangChainLike):
        """Ours, with LangChain's methods beside."""

    both = Both()
    assert as_embedder(both) is both


@pytest.mark.parametrize("found", [3, object(), WordEmbedder, lambda texts: texts])
def test_anything_else_is_refused(found: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LangChain Embeddings"):
        as_embedder(found)
    with pytest.raises(ConfigError, match="LangChain Embeddings"):
        KVLinkRAG.open(tmp_path, embedder=found)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ([[1.0], [2.0, 3.0]], "not numbers"),
        ([["x"], ["y"]], "not numbers"),
        ([[1.0]], r"\[1, 1\], expected \[2, dimension\]"),
        ([[], []], "expected"),
        ([[float("nan")], [1.0]], "not finite"),
        (None, "not numbers"),
    ],
)
def test_bad_vectors_are_named(gives: Any, message: str) -> None:
    adapter = ForeignEmbedder(LangChainLike(), lambda texts: gives, lambda text: [1.0])
    with pytest.raises(ConfigError, match=message):
        adapter.embed(["a", "b"])


def test_the_frameworks_own_objects() -> None:
    core = pytest.importorskip("langchain_core.embeddings")
    fake = as_embedder(core.DeterministicFakeEmbedding(size=6))
    assert fake.dimension == 6
    assert fake.fingerprint != as_embedder(core.DeterministicFakeEmbedding(size=7)).fingerprint
    assert fake.embed(["a"])[0] == pytest.approx(fake.embed_queries(["a"])[0])
    index = pytest.importorskip("llama_index.core.embeddings")
    mock = as_embedder(index.MockEmbedding(embed_dim=5))
    assert mock.dimension == 5
    assert mock.embed(["a", "b"]).shape == (2, 5)
