"""LlamaIndex's chat engines with only the LLM swapped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.schema import TextNode
from llama_index.embeddings.contriever import ContrieverEmbedding
from llama_index.llms.kvlink import KVLink
from tiny import Calls, WordEmbedder, rendered_tokens

from kvlink_rag import KVLinkRAG


@pytest.fixture
def index(nodes: list[TextNode], embedder: WordEmbedder) -> VectorStoreIndex:
    return VectorStoreIndex(nodes, embed_model=ContrieverEmbedding(embedder))


@pytest.mark.parametrize("engine", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_chat_over_documents(
    index: VectorStoreIndex, rag: KVLinkRAG, llm: KVLink, calls: Calls, engine: Any
) -> None:
    chat = engine.from_defaults(
        index.as_retriever(similarity_top_k=2), llm=llm, system_prompt="Be brief."
    )
    first = chat.chat("Which town is Marnik?")
    second = chat.chat("And which town is Hux?")
    assert first.response
    assert second.response
    traces = calls.traces()
    for trace, response in ((traces[0], first), (traces[-1], second)):
        found = [source.node for source in response.source_nodes]
        assert len(found) == 2
        assert trace["reused_tokens"] == rendered_tokens(rag.model, found)
    assert calls.equal_oracle(rag, 8)


@pytest.mark.parametrize("engine", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_streaming_chat(index: VectorStoreIndex, llm: KVLink, engine: Any) -> None:
    def fresh() -> Any:
        return engine.from_defaults(index.as_retriever(similarity_top_k=2), llm=llm)

    async def ask() -> tuple[str, str]:
        answer = await fresh().achat("Which town is Marnik?")
        stream = await fresh().astream_chat("Which town is Marnik?")
        return answer.response, "".join([p async for p in stream.async_response_gen()])

    whole = fresh().chat("Which town is Marnik?").response
    assert "".join(fresh().stream_chat("Which town is Marnik?").response_gen) == whole
    assert asyncio.run(ask()) == (whole, whole)


def test_a_chat_without_documents_keeps_earlier_turns(llm: KVLink, calls: Calls) -> None:
    chat = SimpleChatEngine.from_defaults(llm=llm)
    chat.chat("Hello there!")
    chat.chat("What did I say?")
    second = calls.traces()[1]
    assert second["prefix_tokens"] > 0
    assert "Hello there!" in calls.prompts()[1]
