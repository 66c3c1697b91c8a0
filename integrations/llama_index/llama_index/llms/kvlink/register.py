"""The one extra line of an application that keeps its own vector store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.kvlink.collection import Collection, DirectoryLike, ModelLike
from llama_index.llms.kvlink.nodes import bare_nodes, text_of, to_documents

from kvlink_rag.documents import odd_keys

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG

NAMED = 10  # ids in a warning

logger = logging.getLogger("kvlink_rag.llama_index")


class KVLinkRegister(TransformComponent):
    """Encodes nodes for `KVLink` as they pass through an ingestion pipeline; changes nothing.

    Put it after whatever splits the text. Nodes without text (images, blank pages) pass through
    unregistered; a warning says how many and names them. With `embed=True` nodes are also embedded
    and indexed, for `KVLinkRetriever`, and their metadata must be JSON; without, what is not JSON
    is kept as text in the collection, and a warning names the keys. `model`, `embedder`,
    `directory`, `device`, `codec`, `rag`: as everywhere in this integration, see `KVLink`.

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
    codec: str | None = Field(default=None, description="How snapshots are kept.")
    embed: bool = Field(default=False, description="Whether KVLinkRetriever finds the nodes too.")

    _collection: Collection = PrivateAttr()

    def __init__(
        self,
        *,
        model: ModelLike = None,
        embedder: Any = None,
        directory: DirectoryLike = None,
        device: str = "auto",
        codec: str | None = None,
        embed: bool = False,
        rag: KVLinkRAG | None = None,
    ) -> None:
        collection = Collection(
            model=model,
            embedder=embedder,
            directory=directory,
            device=device,
            codec=codec,
            rag=rag,
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
        found = bare_nodes(nodes)
        documents = to_documents((n for n in found if text_of(n).strip()), strict=self.embed)
        _tell_of_blank([node.node_id for node in found if not text_of(node).strip()], len(found))
        if self.embed:
            self.rag.add(documents)
            return nodes
        if odd := {str(key): 1 for node in found for key in odd_keys(node.metadata)}:
            logger.warning(
                "metadata that is not JSON is kept as text in the collection, under the keys %s",
                ", ".join(odd),
            )
        self.rag.register(documents)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As `__call__`, in a worker thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)


def _tell_of_blank(ids: Sequence[str], of: int) -> None:
    if ids:
        named = ", ".join(map(repr, ids[:NAMED])) + (", ..." if len(ids) > NAMED else "")
        logger.warning(
            "%d of %d nodes have no text and are not registered: %s", len(ids), of, named
        )
