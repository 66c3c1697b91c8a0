"""The one extra line of an application that keeps its own vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.kvlink.collection import Collection, DirectoryLike, ModelLike
from llama_index.llms.kvlink.nodes import to_documents

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG


class KVLinkRegister(TransformComponent):
    """Encodes nodes for `KVLink` as they pass through an ingestion pipeline; changes nothing.

    Put it after whatever splits the text. Nodes without text pass through unregistered. With
    `embed=True` they are also embedded and indexed, for `KVLinkRetriever`. `model`, `embedder`,
    `directory`, `device`, `rag`: as everywhere in this integration, see `KVLink`.

    Examples:
        ```python
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(), KVLinkRegister(directory="my-collection"), ...]
        )
        VectorStoreIndex.from_documents(
            documents, transformations=[SentenceSplitter(), KVLinkRegister()]
        )
        KVLinkRegister()(nodes)
        ```

    """

    model: str | None = Field(default=None, description="Name or directory of the model.")
    embedder: str | None = Field(default=None, description="Name or directory of the encoder.")
    directory: str | None = Field(default=None, description="Where the collection is kept.")
    device: str = Field(default="auto", description="Torch device.")
    embed: bool = Field(default=False, description="Whether KVLinkRetriever finds the nodes too.")

    _collection: Collection = PrivateAttr()

    def __init__(
        self,
        *,
        model: ModelLike = None,
        embedder: Any = None,
        directory: DirectoryLike = None,
        device: str = "auto",
        embed: bool = False,
        rag: KVLinkRAG | None = None,
    ) -> None:
        collection = Collection(
            model=model, embedder=embedder, directory=directory, device=device, rag=rag
        )
        fields: dict[str, Any] = {**collection.names(), "embed": embed}
        super().__init__(**fields)
        self._collection = collection

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "KVLinkRegister"

    @property
    def rag(self) -> KVLinkRAG:
        """The collection, opened."""
        return self._collection.rag()

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Register `nodes` and return them. Raises `kvlink_rag.errors.DocumentError`."""
        documents = to_documents(nodes)
        if self.embed:
            self.rag.add(documents)
        else:
            self.rag.register(documents)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As `__call__`, in a worker thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)
