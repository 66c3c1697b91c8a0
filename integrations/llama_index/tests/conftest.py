"""Fixtures; what they are made of stands in `tiny`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_index.core
import pytest
import torch
from llama_index.core.schema import TextNode
from llama_index.llms.kvlink import KVLink, KVLinkRegister
from tiny import (
    WINDOW,
    Calls,
    WordEmbedder,
    recorded_calls,
    saved_encoder,
    tiny_model,
    town_nodes,
)

from kvlink_rag import KVLinkModel, KVLinkRAG
from kvlink_rag.pretrained import fetch
from kvlink_rag.pretrained.known import ADAPTERS, PAIRS, SMALL

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> KVLinkModel:
    return tiny_model(WINDOW)


@pytest.fixture(scope="session")
def small_window() -> KVLinkModel:
    """A window that eight towns in the default prompts do not fit."""
    return tiny_model(1300)


@pytest.fixture(scope="session")
def saved_model(model: KVLinkModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the model."""
    directory = tmp_path_factory.mktemp("model")
    model.backbone.model.save_pretrained(directory)
    model.tokenizer.hf.save_pretrained(directory)
    (directory / "kvlink.json").write_text(model.spec.to_json())
    return directory


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random encoder."""
    return saved_encoder(tmp_path_factory.mktemp("encoder"))


_PLACES = {model: fetch.place_of(model) for model in PAIRS[SMALL]}  # the user's


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the default pair, in a cache of the test's own; skips where it is not here."""
    if not all(place.is_dir() for place in _PLACES.values()):
        pytest.skip("the pair small is not here; fetch it with: kvlink-rag models get small")
    if not (ADAPTERS[SMALL] / "adapter_model.safetensors").is_file():
        pytest.skip(f"the adapter of the pair small is not in {ADAPTERS[SMALL]}")
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    for model, place in _PLACES.items():
        target = fetch.place_of(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(place, target_is_directory=True)
    return SMALL


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture
def rag(tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "collection", model=model, embedder=embedder) as rag:
        yield rag
        # snapshots of nodes that were given to a question and never registered are no fault
        assert [p for p in rag.check() if "belongs to no document" not in p] == []


@pytest.fixture
def llm(rag: KVLinkRAG) -> KVLink:
    return KVLink(rag=rag, max_new_tokens=8)


@pytest.fixture(autouse=True)
def _no_global_tokenizer() -> Iterator[None]:
    """LlamaIndex's one global that these tests touch."""
    llama_index.core.Settings._tokenizer = llama_index.core.global_tokenizer = None
    yield
    llama_index.core.Settings._tokenizer = llama_index.core.global_tokenizer = None


@pytest.fixture
def nodes(rag: KVLinkRAG) -> list[TextNode]:
    """Towns, registered in the collection and not embedded there."""
    found = town_nodes()
    KVLinkRegister(rag=rag)(found)
    return found


@pytest.fixture
def calls() -> Iterator[Calls]:
    """What every LLM is asked and answers during the test."""
    with recorded_calls() as calls:
        yield calls
