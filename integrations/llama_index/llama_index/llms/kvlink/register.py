"""The one extra line of an application that keeps its own vector store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.kvlink.collection import CollectionFields
from llama_index.llms.kvlink.nodes import bare_nodes, text_of, to_documents, window_of
from llama_index.llms.kvlink.sources import take

from kvlink_rag.documents import Document, odd_keys
from kvlink_rag.errors import DocumentNotFound

if TYPE_CHECKING:
    from llama_index.llms.kvlink.collection import Collection
    from typing_extensions import Self

    from kvlink_rag import KVLinkRAG

NAMED = 10  # ids in a warning
STATE = "state"

logger = logging.getLogger("kvlink_rag.llama_index")


class KVLinkRegister(CollectionFields, TransformComponent):
    """Encodes nodes for `KVLink` as they pass through an ingestion pipeline; changes nothing.

    Put it after whatever splits the text. Nodes without text (images, blank pages) pass through
    unregistered; a warning says how many and names them. With `embed=True` nodes are also embedded
    and indexed, for `KVLinkRetriever`, and their metadata must be JSON; without, what is not JSON
    is kept as text in the collection, and a warning names the keys. Of a node of a
    `SentenceWindowNodeParser` the window is encoded too, since that will stand in the prompt.
    `model`, `embedder`, `directory`, `device`, `codec`, `remote`, `rag`: as everywhere in this
    integration, see `KVLink`.

    Nodes follow their source document (`ref_doc_id`): those of another version of it go, as an
    upsert has it. A node whose id is a random UUID is known by its content, so that a program that
    runs again adds nothing. `delete_ref_doc`, `delete_nodes` and `sync` take nodes out again.

    Examples:
        ```python
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(), KVLinkRegister(directory="my-collection"), ...]
        )
        VectorStoreIndex.from_documents(
            documents, transformations=[SentenceSplitter(), KVLinkRegister()]
        )
        KVLinkRegister(show_progress=True)(nodes)
        register.sync(pipeline.docstore)  # after a run that deleted documents
        ```

    """

    embed: bool = Field(default=False, description="Whether KVLinkRetriever finds the nodes too.")
    show_progress: bool = Field(default=False, description="Whether a bar is shown on stderr.")

    def __init__(self, **words: Any) -> None:
        super().__init__(**words)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "KVLinkRegister"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """LlamaIndex's serialised form, and what a pipeline's cache goes by."""
        return {**super().to_dict(**kwargs), STATE: _State(self._collection)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Of `to_dict`."""
        return super().from_dict({k: value for k, value in data.items() if k != STATE}, **kwargs)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Register `nodes` and return them. Raises `kvlink_rag.errors.DocumentError`."""
        found = bare_nodes(nodes)
        documents = to_documents((n for n in found if text_of(n).strip()), strict=self.embed)
        _tell_of_blank([node.node_id for node in found if not text_of(node).strip()], len(found))
        if not self.embed:
            _tell_of_odd(found)
        windows = [window for d in documents if (window := window_of(d)) is not None]
        take(self.rag, [*documents, *windows], lambda: self._put(documents, windows))
        return nodes

    def _put(self, documents: Sequence[Document], windows: Sequence[Document]) -> None:
        again = documents if self.embed else _found_by_search(self.rag, documents)
        known = {document.id for document in again}
        rest = [document for document in documents if document.id not in known]
        if again:
            self.rag.add(again, show_progress=self.show_progress)
        if rest or windows:
            self.rag.register([*rest, *windows], show_progress=self.show_progress)

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As `__call__`, in a worker thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)


class _State(str):
    """What LlamaIndex's cache of transformations, which goes by the repr, sees of a collection.

    A pipeline does not call what it has called with the same nodes before. Here it does, unless
    the collection is as it was then: else those nodes would pass by and not be registered.
    """

    def __new__(cls, collection: Collection) -> _State:
        state = super().__new__(cls)
        state._collection = collection
        return state

    _collection: Collection

    def __repr__(self) -> str:
        if (rag := self._collection.opened) is None:  # to open it may take seconds
            return uuid4().hex
        return f"{rag.catalog.identity} {rag.catalog.version()}"


def _found_by_search(rag: KVLinkRAG, documents: Sequence[Document]) -> list[Document]:
    """Those whose very text is embedded already: they are added, so that search finds them still.

    A node comes with other metadata each time: its own and its neighbours' random ids.
    """
    ids = [str(document.id) for document in documents]
    known = {entry.id: (entry.title, entry.text) for entry in rag.get(ids, missing_ok=True)}
    same = [d for d in documents if known.get(d.id) == (d.title, d.text)]
    return [document for document in same if _is_embedded(rag, str(document.id))]


def _is_embedded(rag: KVLinkRAG, id: str) -> bool:
    try:
        rag.vectors([id])
    except DocumentNotFound:
        return False
    return True


def _tell_of_odd(nodes: Iterable[BaseNode]) -> None:
    if odd := {str(key): 1 for node in nodes for key in odd_keys(node.metadata)}:
        logger.warning(
            "metadata that is not JSON is kept as text in the collection, under the keys %s",
            ", ".join(odd),
        )


def _tell_of_blank(ids: Sequence[str], of: int) -> None:
    if ids:
        named = ", ".join(map(repr, ids[:NAMED])) + (", ..." if len(ids) > NAMED else "")
        logger.warning(
            "%d of %d nodes have no text and are not registered: %s", len(ids), of, named
        )
