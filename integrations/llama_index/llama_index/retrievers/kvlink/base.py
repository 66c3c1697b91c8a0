"""`KVLinkRetriever`: Contriever and FAISS over nodes that are already encoded for `KVLink`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseNode, IndexNode, NodeWithScore, QueryBundle
from llama_index.llms.kvlink.collection import Collection, DirectoryLike, ModelLike
from llama_index.llms.kvlink.nodes import to_documents, to_node

from kvlink_rag.arguments import check_count
from kvlink_rag.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG


class KVLinkRetriever(BaseRetriever):
    """Finds the `k` best nodes of a collection; fewer where there are fewer.

    Args:
        k: nodes a query; an integer of at least 1.
        rounds: 2 searches again from the best first hits, for two-hop questions.
        model, embedder, directory, device, codec, rag: as everywhere in this integration, see
            `KVLink`.

    Examples:
        ```python
        retriever = KVLinkRetriever(k=5, directory="my-collection")
        retriever.add(nodes)
        RetrieverQueryEngine.from_args(retriever, llm=KVLink(directory="my-collection"))
        ```

    """

    def __init__(
        self,
        k: int = 10,
        *,
        rounds: int = 1,
        model: ModelLike = None,
        embedder: Any = None,
        directory: DirectoryLike = None,
        device: str = "auto",
        codec: str | None = None,
        rag: KVLinkRAG | None = None,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        check_count(k)
        if rounds not in (1, 2):
            raise ConfigError(f"rounds is {rounds}, expected 1 or 2")
        self.k, self.rounds = k, rounds
        self._collection = Collection(
            model=model,
            embedder=embedder,
            directory=directory,
            device=device,
            codec=codec,
            rag=rag,
        )
        super().__init__(
            callback_manager=callback_manager,
            object_map=object_map,
            objects=objects,
            verbose=verbose,
        )

    @property
    def rag(self) -> KVLinkRAG:
        """The collection, opened."""
        return self._collection.rag()

    def add(self, nodes: Sequence[BaseNode]) -> None:
        """Embed, index and encode nodes; what is there costs nothing.

        Raises `kvlink_rag.errors.DocumentError`, and adds none, for a node without text and for
        metadata that is not JSON, which would not come back as it was.
        """
        self.rag.add(to_documents(nodes, strict=True))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The best nodes for the bundle's embedding texts: the query, or what HyDE made of it."""
        query = "\n".join(query_bundle.embedding_strs)
        return [to_node(hit) for hit in self.rag.search(query, self.k, rounds=self.rounds)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
