"""What the tests share: a collection of towns, see `towns`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from towns import VOCABULARY, open_towns, save_pair
from vllm_kvlink.front import Front
from vllm_kvlink.orders import secret_in

from kvlink_rag import KVLinkRAG


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture
def rag(tmp_path: Path, pair: tuple[Path, Path]) -> Iterator[KVLinkRAG]:
    with open_towns(tmp_path / "towns", pair) as rag:
        yield rag


@pytest.fixture
def front(rag: KVLinkRAG) -> Front:
    return Front(rag, VOCABULARY, secret_in(rag.directory))
