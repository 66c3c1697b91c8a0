"""`KVLinkRetriever`: Contriever and FAISS over nodes that are already encoded for `KVLink`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseNode, IndexNode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters
from llama_index.llms.kvlink.collection import Collection, OnCollection
from llama_index.llms.kvlink.errors import ArgumentError
from llama_index.llms.kvlink.filters import as_where
from llama_index.llms.kvlink.nodes import to_documents, to_node
from llama_index.llms.kvlink.sources import take

from kvlink_rag.arguments import check_count
from kvlink_rag.errors import ConfigError

if TYPE_CHECKING:
    from llama_index.llms.kvlink.collection import Words
    from typing_extensions import Unpack


DEFAULT_K = 10


class KVLinkRetriever(OnCollection, BaseRetriever):
    """Finds the `k` best nodes of a collection; fewer where there are fewer.

    Args:
        k: nodes a query; an integer of at least 1. similarity_top_k: LlamaIndex's word for it.
        filters: LlamaIndex's `MetadataFilters`, nested or not; applied to the whole ranking, so
            that k are found where there are k.
        rounds: 2 searches again from the best first hits, for two-hop questions.
        model, embedder, directory, device, codec, remote, rag: as everywhere in this integration,
            see `KVLink`.

    `delete_ref_doc`, `delete_nodes` and `sync` take nodes out again.

    Examples:
        ```python
        retriever = KVLinkRetriever(k=5, directory="my-collection")
        retriever.add(nodes)
        RetrieverQueryEngine.from_args(retriever, llm=KVLink(directory="my-collection"))
        ```

    """

    def __init__(
        self,
        k: int = DEFAULT_K,
        *,
        similarity_top_k: int | None = None,
        rounds: int = 1,
        filters: MetadataFilters | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
        **words: Unpack[Words],
    ) -> None:
        if similarity_top_k is not None and k not in (DEFAULT_K, similarity_top_k):
            raise ArgumentError("found k and similarity_top_k, which are one number; give one")
        if rounds not in (1, 2):
            raise ConfigError(f"rounds is {rounds}, expected 1 or 2")
        self.k = k if similarity_top_k is None else similarity_top_k
        check_count(self.k)
        self.rounds, self.filters = rounds, filters
        as_where(filters)
        self._collection = Collection(**words)
        super().__init__(
            callback_manager=callback_manager,
            object_map=object_map,
            objects=objects,
            verbose=verbose,
        )

    @property
    def similarity_top_k(self) -> int:
        """`k`, by LlamaIndex's name."""
        return self.k

    @similarity_top_k.setter
    def similarity_top_k(self, k: int) -> None:
        self.k = k

    def add(self, nodes: Sequence[BaseNode], *, show_progress: bool = False) -> None:
        """Embed, index and encode nodes; what is there costs nothing.

        Nodes of another version of their source document go, and one whose id is a random UUID is
        known by its content, as in `KVLinkRegister`. show_progress: a bar on stderr. Raises
        `kvlink_rag.errors.DocumentError`, and adds none, for a node without text and for metadata
        that is not JSON, which would not come back as it was.
        """
        documents = to_documents(nodes, strict=True)
        take(self.rag, documents, lambda: self.rag.add(documents, show_progress=show_progress))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The best nodes for the bundle's embedding texts: the query, or what HyDE made of it."""
        query, where = "\n".join(query_bundle.embedding_strs), as_where(self.filters)
        hits = self.rag.search(query, self.k, rounds=self.rounds, where=where)
        return [to_node(hit) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
