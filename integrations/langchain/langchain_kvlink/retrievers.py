"""`KVLinkRetriever`: the documents of a collection, by question.

Knows searches; knows no prompts.
"""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from langchain_kvlink.collection import CollectionFields
from langchain_kvlink.documents import from_passage
from langchain_kvlink.filters import Filter, as_where, once


class KVLinkRetriever(CollectionFields, BaseRetriever):
    """The best `k` documents of a collection, best first.

        retriever = KVLinkRetriever(directory="my-collection", k=10)
        retriever.invoke("When was the harbour built?", k=3)

    `k`, `rounds` and `filter` may also be given to a call. rounds: 2 asks again with the best hits,
    for questions whose second fact the question does not name. filter: as in `KVLinkVectorStore`.
    A collection that holds fewer gives fewer. Raises `kvlink_rag.errors.ConfigError` for k < 1.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    k: int = Field(default=4, ge=1, strict=True)
    rounds: int = Field(default=1, ge=1, le=2, strict=True)
    filter: Filter | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        rounds: int | None = None,
        filter: Filter | None = None,
    ) -> list[Document]:
        hits = self.collection.search(
            query,
            self.k if k is None else k,
            rounds=self.rounds if rounds is None else rounds,
            where=once(as_where(self.filter if filter is None else filter)),
        )
        return [from_passage(hit.document) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return await run_in_executor(
            None,
            self._get_relevant_documents,
            query,
            run_manager=run_manager.get_sync(),
            **kwargs,
        )
