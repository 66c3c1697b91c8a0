"""Fixtures; what they are made of stands in `tiny`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_index.core
import pytest
import torch
from llama_index.core.schema import TextNode
from llama_index.llms.kvlink import KVLink, KVLinkRegister
from tiny import WINDOW, Calls, WordEmbedder, recorded_calls, tiny_model, town_nodes

from kvlink_rag import KVLinkModel, KVLinkRAG

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> KVLinkModel:
    return tiny_model(WINDOW)


@pytest.fixture(scope="session")
def small_window() -> KVLinkModel:
    """A window that eight towns in the default prompts do not fit."""
    return tiny_model(1300)


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
