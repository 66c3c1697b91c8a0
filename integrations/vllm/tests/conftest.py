"""A collection of a few documents over a tiny model, shared by the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from kvlink_rag import KVLinkModel, KVLinkRAG

torch.set_num_threads(1)


class NoEmbedder:
    """Nothing here searches."""

    dimension, name, fingerprint = 8, "none", "none"

    def embed(self, texts: object) -> object:
        raise AssertionError("nothing here embeds")

    embed_queries = embed


@pytest.fixture(scope="session")
def model() -> KVLinkModel:
    return tiny.model()


@pytest.fixture
def rag(tmp_path: Path, model: KVLinkModel) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(tmp_path / "collection", model=model, embedder=NoEmbedder()) as opened:
        opened.register(tiny.documents())
        yield opened
