"""The suites of `langchain-tests` that need a model, none overridden, on a tiny random pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.vectorstores import VectorStore
from langchain_kvlink import (
    ChatKVLink,
    ContrieverEmbeddings,
    KVLinkRetriever,
    KVLinkVectorStore,
)
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)


class TestChatKVLink(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _pair(self, saved_pair: tuple[Path, Path]) -> None:
        self.lm, _ = saved_pair

    @property
    def chat_model_class(self) -> type[ChatKVLink]:
        return ChatKVLink

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.lm, "max_tokens": 16}

    @property
    def supports_model_override(self) -> bool:
        return False


class TestContrieverEmbeddings(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _pair(self, saved_pair: tuple[Path, Path]) -> None:
        _, self.encoder = saved_pair

    @property
    def embeddings_class(self) -> type[ContrieverEmbeddings]:
        return ContrieverEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"embedder": self.encoder}


class TestKVLinkRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, saved_pair: tuple[Path, Path]) -> None:
        """The default collection of this test, with more than three documents."""
        self.store = KVLinkVectorStore.from_texts(
            [f"House number {n} has a red door." for n in range(5)],
            saved_pair[1],
            model=saved_pair[0],
        )

    @property
    def retriever_constructor(self) -> type[KVLinkRetriever]:
        return KVLinkRetriever

    @property
    def retriever_query_example(self) -> str:
        return "Which house has a red door?"


class TestKVLinkVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(  # type: ignore[override]
        self, tmp_path: Path, saved_pair: tuple[Path, Path]
    ) -> VectorStore:
        return KVLinkVectorStore(
            self.get_embeddings(), model=saved_pair[0], directory=tmp_path / "collection"
        )
