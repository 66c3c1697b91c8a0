"""LangChain's documents and kvlink_rag's, one as the other, and passages in messages.

A passage's title is `metadata["title"]`. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_core.documents import Document
from langchain_core.runnables.config import run_in_executor

from kvlink_rag.documents import Document as Passage
from kvlink_rag.errors import DocumentError

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG
    from langchain_kvlink.collection import CollectionFields
    from langchain_kvlink.vectorstores import KVLinkVectorStore

    HasCollection: TypeAlias = KVLinkRAG | KVLinkVectorStore | CollectionFields

TITLE = "title"


def register_documents(target: HasCollection, documents: Iterable[Document]) -> list[str]:
    """Encode `documents` for an application that keeps its own vector store; their ids.

    target: an open `KVLinkRAG`, or any object of this package, whose collection is meant. The
    documents must be split as they are in that store: a passage is recognised in a prompt where
    its whole text stands there. They are not embedded, and what they hold already costs nothing.
    Documents without text are left out, metadata that is not JSON is kept as text. Raises
    `kvlink_rag.errors.DocumentError` (a `ValueError`), such as `PassageTooLong`.

        register_documents(llm, splits)
    """
    rag: Any = getattr(target, "collection", target)
    found = (to_passage(document, strict=False) for document in documents)
    passages = [passage.identified() for passage in found if passage.text.strip()]
    rag.register(passages)
    return [str(passage.id) for passage in passages]


async def aregister_documents(target: HasCollection, documents: Iterable[Document]) -> list[str]:
    """`register_documents` in a thread of the executor."""
    return await run_in_executor(None, register_documents, target, documents)


def document_block(document: Document) -> dict[str, Any]:
    """A content block that hands `document` to `ChatKVLink` as a passage.

        HumanMessage([document_block(found), {"type": "text", "text": "When was it built?"}])

    It is LangChain's standard plain-text block, so other chat models read it too.
    """
    block = {"type": "text-plain", "text": document.page_content, "mime_type": "text/plain"}
    title = title_of(document.metadata)
    return {**block, "title": title} if title else block


def to_passages(
    documents: Sequence[Document], ids: Sequence[str | None] | None = None
) -> list[Passage]:
    """The passages of `documents`, with an id each. Raises `DocumentError`, `ValueError`."""
    if ids is not None and len(ids) != len(documents):
        raise ValueError(f"found {len(ids)} ids for {len(documents)} documents, expected as many")
    given = ids if ids is not None else [None] * len(documents)
    passages = [to_passage(d, id) for d, id in zip(documents, given, strict=True)]
    return [passage.identified() for passage in passages]


def to_passage(document: Document, id: str | None = None, *, strict: bool = True) -> Passage:
    """The passage of a document. With `strict`, metadata must be JSON. Raises `DocumentError`."""
    if not isinstance(document, Document):
        raise DocumentError(
            f"found a {type(document).__name__}, expected a langchain_core Document"
        )
    metadata = document.metadata if strict else jsonable(document.metadata)
    found = Passage(
        document.page_content,
        title=title_of(metadata),
        id=id or document.id or None,
        metadata=metadata,
    )
    found.canonical()  # DocumentError where the metadata is not JSON
    return found


def from_passage(passage: Passage) -> Document:
    """The document of a passage. A title that the metadata lacks stands there as "title"."""
    metadata = dict(passage.metadata)
    if passage.title and title_of(metadata) != passage.title:
        metadata[TITLE] = passage.title
    return Document(page_content=passage.text, metadata=metadata, id=passage.id)


def title_of(metadata: Mapping[str, Any]) -> str:
    """The title, if it is a string with something in it."""
    title = metadata.get(TITLE)
    return title if isinstance(title, str) and title.strip() else ""


def jsonable(value: Any) -> Any:
    """`value` as JSON takes it: other objects, keys and numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return str(value)
