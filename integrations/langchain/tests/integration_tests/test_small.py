"""No model argument anywhere: the pair `small`, or the way to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from langchain_classic.chains.retrieval import create_retrieval_chain
from langchain_kvlink import ChatKVLink, KVLinkDocumentsChain, KVLinkVectorStore

from kvlink_rag.errors import ConfigError

TEXTS = [
    "The harbour of Orvale was built in 1911.",
    "Marnik is a town in the hills, known for its market.",
]
QUESTION = "When was the harbour of Orvale built?"


def test_no_arguments_anywhere(small: str) -> None:
    store = KVLinkVectorStore.from_texts(TEXTS)
    llm = ChatKVLink(max_tokens=4)
    chain = create_retrieval_chain(
        store.as_retriever(search_kwargs={"k": 2}), KVLinkDocumentsChain(llm=llm)
    )
    told = chain.invoke({"input": QUESTION})
    assert told["context"][0].page_content == TEXTS[0]
    assert told["answer"]
    assert llm.collection is store.collection
    assert (llm.collection.model_name, llm.collection.embedder_name) == (small, small)


@pytest.mark.parametrize(
    "first_use",
    [lambda: KVLinkVectorStore.from_texts(TEXTS), lambda: ChatKVLink().invoke(QUESTION)],
    ids=["store", "model"],
)
def test_a_newcomer_is_told_how_to_get_it(
    first_use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="kvlink-rag models get small"):
        first_use()
