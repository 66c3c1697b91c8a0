"""`KVLinkRetriever`: the documents of a collection, by question.

Knows searches; knows no prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from kvlink_rag.errors import ConfigError
from langchain_kvlink.collection import CollectionFields
from langchain_kvlink.documents import from_passage

if TYPE_CHECKING:
    from kvlink_rag.documents import Document as Passage

Filter = Mapping[str, Any] | Callable[[Document], bool]


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
            where=as_where(self.filter if filter is None else filter),
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


def as_where(filter: Filter | None) -> Callable[[Passage], bool] | None:
    """A LangChain filter as the engine's: of a passage.

    A mapping asks that metadata have these values; a function takes a document. Raises
    `ConfigError` (a `ValueError`) for anything else, such as operators.
    """
    if filter is None:
        return None
    if isinstance(filter, Mapping):
        wanted = dict(filter)
        _check_wanted(wanted)
        return lambda passage: all(
            key in passage.metadata and passage.metadata[key] == value
            for key, value in wanted.items()
        )
    if callable(filter):
        accepts = filter
        return lambda passage: bool(accepts(from_passage(passage)))
    raise ConfigError(
        f"filter is a {type(filter).__name__}, expected a mapping of metadata or a function of a "
        "Document"
    )


def _check_wanted(wanted: Mapping[Any, Any]) -> None:
    """Raise `ConfigError` for what no metadata can equal: operators, other keys, tuples, sets."""
    supported = (
        "supported are equality with a value, as {'key': value}, several keys at once (all must "
        "hold), and for all else a function, as lambda document: document.metadata['n'] > 3"
    )
    for key, value in wanted.items():
        names = [key, *(value if isinstance(value, Mapping) else ())]
        if operators := [name for name in names if str(name).startswith("$")]:
            raise ConfigError(f"the filter has the operator {operators[0]!r}; {supported}")
        if not isinstance(key, str):
            raise ConfigError(f"the filter has the key {key!r}, expected a string; {supported}")
        if isinstance(value, tuple | set | frozenset):
            raise ConfigError(
                f"the filter asks {key!r} for a {type(value).__name__}, which no metadata holds; "
                f"{supported}"
            )
