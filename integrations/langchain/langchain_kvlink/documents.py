"""LangChain's documents and kvlink_rag's, one as the other, and passages in messages.

A passage's title is `metadata["title"]`. Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import RFC_4122, UUID

from langchain_core.documents import Document

from kvlink_rag.documents import Document as Passage
from kvlink_rag.documents import as_json, bounded, odd_keys
from kvlink_rag.errors import DocumentError

TITLE = "title"
_FRESH = (1, 4, 6, 7)  # versions of UUIDs that are another one each time they are made

logger = logging.getLogger("kvlink_rag.langchain")


def document_block(document: Document) -> dict[str, Any]:
    """A content block that hands `document` to `ChatKVLink` as a passage.

        HumanMessage([document_block(found), {"type": "text", "text": "When was it built?"}])

    It is LangChain's standard plain-text block, so other chat models read it too. Raises
    `DocumentError` for a document without text.
    """
    check_document(document)
    block = {"type": "text-plain", "text": document.page_content, "mime_type": "text/plain"}
    title = title_of(document.metadata)
    return {**block, "title": title} if title else block


def to_passages(
    documents: Iterable[Document],
    ids: Sequence[str | None] | None = None,
    *,
    strict: bool = True,
) -> list[Passage]:
    """The passages of `documents`, with an id each.

    strict: as in `to_passage`; otherwise a warning tells what became text. Raises `DocumentError`
    for a document without text or of another type, and for another number of ids.
    """
    found = checked_documents(documents)
    given = [None] * len(found) if ids is None else listed(ids, "ids")
    if len(given) != len(found):
        raise DocumentError(f"found {len(given)} ids for {len(found)} documents, expected as many")
    passages = [to_passage(d, id, strict=strict) for d, id in zip(found, given, strict=True)]
    if odd := {} if strict else {str(key): 1 for d in found for key in odd_keys(d.metadata)}:
        logger.warning(
            "metadata that is not JSON is kept as text, under the keys %s", ", ".join(odd)
        )
    return [passage.identified() for passage in passages]


def listed(values: Any, what: str) -> list[Any]:
    """`values` as a list; one string is a list of one. Raises `DocumentError` for what is none."""
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Iterable):
        raise DocumentError(f"{what} is a {type(values).__name__}, expected a list")
    return list(values)


def checked_documents(documents: Iterable[Document]) -> list[Document]:
    """`documents`, all of them with text. Raises `DocumentError` that says which is not."""
    if isinstance(documents, Document | str) or not isinstance(documents, Iterable):
        raise DocumentError(
            f"found one {type(documents).__name__}, expected a list of langchain_core Documents; "
            "use [document]"
        )
    found = list(documents)
    for number, document in enumerate(found, 1):
        check_document(document, f" {number} of {len(found)}")
    return found


def check_document(document: Document, place: str = "") -> None:
    """Raise `DocumentError` where `document` is none or has no text. place: such as " 2 of 5"."""
    if not isinstance(document, Document):
        raise DocumentError(
            f"found a {type(document).__name__} as document{place}, expected a langchain_core "
            "Document"
        )
    if not document.page_content.strip():
        title = title_of(document.metadata)
        raise DocumentError(
            f"document{place} (id {document.id!r}, title {title!r}) has no text; leave it out, as "
            "with [d for d in documents if d.page_content.strip()]"
        )


def to_passage(document: Document, id: str | None = None, *, strict: bool = True) -> Passage:
    """The passage of a document. With `strict`, metadata must be JSON. Raises `DocumentError`."""
    whole = bounded(document.metadata, f"the metadata of the document (id {document.id!r})")
    metadata = whole if strict else as_json(whole)
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


def is_fresh(id: str | None) -> bool:
    """Whether an id is a UUID made by a clock or at random, so that it says nothing of content."""
    try:
        found = UUID(id or "")
    except ValueError:
        return False
    return found.variant == RFC_4122 and found.version in _FRESH and id in (str(found), found.hex)
