"""Embedding objects that are not ours: real ones of both frameworks, and plain look-alikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.collection import reencoding
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


class Encoder:
    """Of one class and no name, told apart by a private field; counts what it is asked."""

    def __init__(self, salt: str = "", noise: float = 0.0, asks: str = "") -> None:
        self._words, self._asked = WordEmbedder(salt), WordEmbedder(asks or salt)
        self._noise, self._random = noise, np.random.default_rng(7)
        self.calls = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.calls += 1
        return [self._noisy(vector).tolist() for vector in self._words.embed(texts)]

    def embed_query(self, text: str) -> list[float]:
        self.calls += 1
        return self._noisy(self._asked.embed([text])[0]).tolist()

    def _noisy(self, vector: np.ndarray) -> np.ndarray:
        return vector + self._noise * self._random.normal(size=vector.shape) / vector.size**0.5


@pytest.fixture
def filled(tmp_path: Path, make_model: ModelMaker) -> Any:
    """Opens one collection, which an `Encoder` filled, with any embedder."""
    model = make_model("llama", torch.float32)

    def opened(made: object, **words: Any) -> KVLinkRAG:
        return KVLinkRAG.open(tmp_path, model=model, embedder=made, **words)

    with opened(Encoder()) as rag:
        rag.add(DOCS)
    return opened


def found(rag: KVLinkRAG, name: str = "Marnik") -> bool:
    (hit,) = rag.search(f"{name} lies on the coast.", 1)
    return hit.document.id == name and hit.score > 0.8


@pytest.mark.parametrize(
    "other", [{"salt": "e5"}, {"asks": "other prompt"}, {"noise": 0.2}], ids=lambda w: next(iter(w))
)
def test_another_encoder_of_one_class_is_another(filled: Any, other: dict[str, Any]) -> None:
    with filled(Encoder(**other)) as rag:
        with pytest.raises(SettingsMismatch, match="embedder"):
            rag.search("Where is Marnik?", 1)
        with pytest.raises(SettingsMismatch, match="embedder"):
            rag.add([Document("Sarno lies inland.")])
        assert len(rag) == 3
    with filled(Encoder()) as rag:
        assert found(rag)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_one_encoder_is_the_same_by_any_name(filled: Any, noise: float) -> None:
    renamed = type("Renamed", (Encoder,), {"model_name": "moved/words"})(noise=noise)
    for made in (Encoder(noise=noise), renamed, LangChainLike(), LlamaIndexLike()):
        with filled(made) as rag:
            assert found(rag)


def test_opening_asks_the_encoder_nothing(filled: Any) -> None:
    made = Encoder()
    with filled(made) as rag:
        assert made.calls == 0
        assert found(rag)
        first = made.calls
        assert found(rag)
        assert found(rag, "Orvale")
        assert made.calls == first + 2


def test_a_collection_older_than_probes_goes_by_the_name_once(filled: Any) -> None:
    with filled(Encoder()) as rag:
        rag.catalog.set_setting("embedder_probes", None)
    with filled(LangChainLike()) as rag, pytest.raises(SettingsMismatch, match="embedder"):
        found(rag)
    with filled(Encoder()) as rag:
        assert found(rag)
    with filled(Encoder("e5")) as rag, pytest.raises(SettingsMismatch, match="embedder"):
        found(rag)
    with filled(LangChainLike()) as rag:
        assert found(rag)


def test_probes_of_another_embedder_count_for_nothing(filled: Any) -> None:
    """As an older release leaves them, which embeds all again for another and knows no probes."""
    other = type("Other", (Encoder,), {})
    with filled(Encoder()) as rag:
        rag.catalog.set_setting("embedder_identity", as_embedder(other()).fingerprint)
    with filled(Encoder()) as rag, pytest.raises(SettingsMismatch, match="embedder"):
        found(rag)
    with filled(other("e5")) as rag:
        rag.vectors(["Marnik"])
        found(rag)
        assert rag.catalog.settings()["embedder_probes"]["of"] == rag.embedder.fingerprint


def cut_short(parts: object, entries: object) -> None:
    raise RuntimeError("cut short")


def test_another_encoder_of_one_class_embeds_again(
    filled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(reencoding, "embed_again", cut_short)
        with pytest.raises(RuntimeError, match="cut short"):
            filled(Encoder("e5"), reencode=True)
    for half in (Encoder(), Encoder("e5")):
        with filled(half) as rag, pytest.raises(SettingsMismatch, match="interrupted"):
            found(rag)
    with filled(Encoder("e5"), reencode=True) as rag:
        assert found(rag)
    with filled(Encoder("e5")) as rag:
        assert found(rag)
    with filled(Encoder()) as rag, pytest.raises(SettingsMismatch, match="embedder"):
        found(rag)


class Tuned:
    """As a wrapper of sentence-transformers holds its model: in a private field."""

    def __init__(self, depth: int) -> None:
        torch.manual_seed(0)
        self.calls = 0
        self._client = torch.nn.Linear(64, 64)
        if depth:
            self._held = type("Held", (), {})()
            self._held.model = self.__dict__.pop("_client")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.calls += 1
        model = self._client if hasattr(self, "_client") else self._held.model
        with torch.no_grad():
            return model(torch.from_numpy(words.embed(texts))).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]

    def tune(self) -> None:
        model = self._client if hasattr(self, "_client") else self._held.model
        model.weight.data.copy_(torch.randn(64, 64))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_model_that_is_tuned_in_memory_is_another(
    tmp_path: Path, make_model: ModelMaker, depth: int
) -> None:
    made = Tuned(depth)
    with KVLinkRAG.open(tmp_path, model=make_model("llama", torch.float32), embedder=made) as rag:
        rag.add(DOCS)
        calls = made.calls
        assert found(rag)
        assert made.calls == calls + 1  # it looked the same, so it was not probed again
        made.tune()
        with pytest.raises(SettingsMismatch, match="embedder"):
            found(rag)
        with pytest.raises(SettingsMismatch, match="embedder"):
            rag.add([Document("Sarno lies inland.")])


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
