"""`KVLinkVectorStore`: a collection in the place of a LlamaIndex vector store.

Knows queries and nodes; what belongs to which source stands in `sources`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.llms.kvlink.collection import CollectionFields
from llama_index.llms.kvlink.errors import NotSupported
from llama_index.llms.kvlink.filters import as_where
from llama_index.llms.kvlink.nodes import origin_of, to_documents, to_node
from llama_index.llms.kvlink.sources import take

from kvlink_rag.documents import Document, Hit

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG


class KVLinkVectorStore(CollectionFields, BasePydanticVectorStore):
    """The nodes of a collection for a `VectorStoreIndex` or an `IngestionPipeline`.

    What is added is embedded, indexed and encoded by the collection; vectors that nodes bring along
    are not used, so any `embed_model` will do, such as `MockEmbedding(1)`. A query goes by its
    text, or by its vector where it has no text, then one of the collection's own embedder. Nodes
    follow their source document as in `KVLinkRegister`. Raises `kvlink_rag.errors.DocumentError`
    for a node without text or with metadata that is not JSON, `NotSupported` for other query modes.

    Examples:
        ```python
        store = KVLinkVectorStore(directory="my-collection")
        index = VectorStoreIndex.from_vector_store(store, embed_model=MockEmbedding(1))
        index.insert(document)
        index.delete_ref_doc(document.doc_id)
        index.as_query_engine(llm=KVLink(directory="my-collection"), filters=filters)
        ```

    """

    stores_text: bool = True
    is_embedding_query: bool = False

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "KVLinkVectorStore"

    @property
    def client(self) -> KVLinkRAG:
        """The collection, opened."""
        return self.rag

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Embed, index and encode nodes; their ids."""
        documents = to_documents(nodes, strict=True)
        take(self.rag, documents, lambda: self.rag.add(documents))
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete all nodes of a source document."""
        self.delete_ref_doc(ref_doc_id)

    def delete_nodes(  # type: ignore[override]  # of both bases
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> int:
        """Delete nodes by id, by filters, or by both, and say how many."""
        if filters is None:
            return super().delete_nodes(node_ids or ())
        return super().delete_nodes([n.node_id for n in self.get_nodes(node_ids, filters)])

    def clear(self) -> None:
        """Delete all nodes."""
        super().delete_nodes([origin_of(document).node_id for document in self.rag.documents()])

    def get_nodes(
        self, node_ids: Sequence[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Nodes by id, by filters, or by both; all of them without either."""
        where = _where(filters, node_ids)
        return [to_node(Hit(d, 0.0)).node for d in self.rag.documents() if where(d)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The best nodes for a query, best first."""
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise NotSupported(
                f"found the query mode {query.mode.value!r}, expected 'default': a collection is "
                "searched by vectors"
            )
        # an index asks for no node by name where the store keeps the text
        where = _where(query.filters, query.node_ids or None, query.doc_ids)
        if query.query_str is not None or query.query_embedding is None:
            hits = self.rag.search(query.query_str or "", query.similarity_top_k, where=where)
        else:
            vector = np.asarray(query.query_embedding, dtype=np.float32)
            hits = self.rag.search_vector(vector, query.similarity_top_k, where=where)
        nodes = [to_node(hit).node for hit in hits]
        return VectorStoreQueryResult(
            nodes=nodes,
            similarities=[hit.score for hit in hits],
            ids=[node.node_id for node in nodes],
        )

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """`add` in a worker thread."""
        return await asyncio.to_thread(self.add, nodes)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete` in a worker thread."""
        await asyncio.to_thread(self.delete, ref_doc_id)

    async def adelete_nodes(
        self,
        node_ids: Sequence[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """`delete_nodes` in a worker thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    async def aclear(self) -> None:
        """`clear` in a worker thread."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: Sequence[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """`get_nodes` in a worker thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """`query` in a worker thread."""
        return await asyncio.to_thread(self.query, query)


def _where(
    filters: MetadataFilters | None,
    node_ids: Sequence[str] | None,
    doc_ids: Sequence[str] | None = None,
) -> Callable[[Document], bool]:
    """Whether a document is of these filters, nodes and sources, as far as they are given."""
    meets = as_where(filters)

    def tests(document: Document) -> Iterator[bool]:
        origin = origin_of(document)
        yield node_ids is None or origin.node_id in node_ids
        yield doc_ids is None or origin.source in doc_ids
        yield meets is None or meets(document)

    return lambda document: all(tests(document))
