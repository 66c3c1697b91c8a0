"""The suites of `langchain-tests` that need no model, none overridden."""

from __future__ import annotations

from langchain_kvlink import ChatKVLink, ContrieverEmbeddings
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests


class TestChatKVLink(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatKVLink]:
        return ChatKVLink


class TestContrieverEmbeddings(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[ContrieverEmbeddings]:
        return ContrieverEmbeddings
