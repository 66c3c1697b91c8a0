"""The suites of `langchain-tests` that need a model, none overridden, on the bundled pair."""

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
    @property
    def chat_model_class(self) -> type[ChatKVLink]:
        return ChatKVLink

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"max_tokens": 16}

    @property
    def supports_model_override(self) -> bool:
        return False


class TestContrieverEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[ContrieverEmbeddings]:
        return ContrieverEmbeddings


class TestKVLinkRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self) -> None:
        """The default collection of this test, with more than three documents."""
        self.store = KVLinkVectorStore.from_texts(
            [f"House number {n} has a red door." for n in range(5)]
        )

    @property
    def retriever_constructor(self) -> type[KVLinkRetriever]:
        return KVLinkRetriever

    @property
    def retriever_query_example(self) -> str:
        return "Which house has a red door?"


class TestKVLinkVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> VectorStore:  # type: ignore[override]
        return KVLinkVectorStore(self.get_embeddings(), directory=tmp_path / "collection")
