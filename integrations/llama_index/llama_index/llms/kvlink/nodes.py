"""LlamaIndex nodes and kvlink_rag documents, one as the other.

A passage is the node's bare text; its title comes from the metadata; what is not JSON in the
metadata becomes text, or is an error (`strict`). What else LlamaIndex knows of a node (excluded
keys, relationships, places in its source) stands in the document's metadata under `NODE`. A node
whose id is a random UUID, as LlamaIndex gives one anew at each run, is known by its content, and
has that id again when it comes back. Knows no collection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import RFC_4122, UUID

from llama_index.core.schema import (
    BaseNode,
    MetadataMode,
    NodeWithScore,
    TextNode,
)

from kvlink_rag.documents import Document, Hit, as_json, bounded, jsonable
from kvlink_rag.errors import DocumentError

TITLE_KEYS = ("title", "file_name")  # the first that is there is a passage's title
NODE = "_node"
WINDOW = "window"  # where a `SentenceWindowNodeParser` keeps the text that will stand in the prompt
ID, SOURCE = "id_", "source"  # of what stands under NODE: a random id, and (ref_doc_id, hash)
_OWN = ("id_", "text", "metadata", "embedding", "class_name", "hash")  # kept otherwise, or derived
_FRESH = (1, 4, 6, 7)  # versions of UUIDs that are another one each time they are made
_DATES = ("creation_date", "last_modified_date", "last_accessed_date")  # of a file, not of its text


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a document comes from: its node, and the source document with the hash it had then."""

    node_id: str
    source: str | None
    version: str | None


def to_document(node: BaseNode | NodeWithScore, *, strict: bool = False) -> Document:
    """The passage of a node: bare text, the node's id, a title, metadata that is JSON.

    Raises `DocumentError` for what is no node; with `strict`, for metadata that is not JSON too.
    """
    node = bare(node)
    with _finite(node):
        metadata = bounded(node.metadata, _its_metadata(node))
        metadata = metadata if strict else as_json(metadata)
        title = title_of(node.metadata)
        content = Document(text_of(node), title=title, id=node.node_id or None, metadata=metadata)
        content.canonical()  # DocumentError where the metadata is not JSON
        return Document(
            content.text,
            title=title,
            id=_content_id(content, node) if is_fresh(node.node_id) else content.id,
            metadata={**metadata, **_more(node)},
        )


def bare(node: BaseNode | NodeWithScore, place: str = "") -> BaseNode:
    """A node without its score. Raises `DocumentError` for what is none."""
    found = node.node if isinstance(node, NodeWithScore) else node
    if not isinstance(found, BaseNode):
        raise DocumentError(
            f"found a {type(found).__name__} as node{place}, expected a LlamaIndex node, such as "
            "TextNode(text=...)"
        )
    return found


def bare_nodes(nodes: Iterable[BaseNode | NodeWithScore]) -> list[BaseNode]:
    """All nodes without their scores. Raises `DocumentError` for what is no list of nodes."""
    if isinstance(nodes, BaseNode | NodeWithScore | str) or not isinstance(nodes, Iterable):
        raise DocumentError(
            f"found one {type(nodes).__name__}, expected a list of nodes; use [node]"
        )
    found = list(nodes)
    return [bare(node, f" {n} of {len(found)}") for n, node in enumerate(found, 1)]


def text_of(node: BaseNode) -> str:
    """The node's bare text; "" where it is an image or the like."""
    return node.get_content(metadata_mode=MetadataMode.NONE) or ""


def origin_of(document: Document) -> Origin:
    """Where a document of a collection comes from."""
    more = document.metadata.get(NODE, {})
    source, version = more.get(SOURCE, (None, None))
    return Origin(more.get(ID, str(document.id)), source, version)


def window_id(id: str) -> str:
    """The id of the document that holds the text round a sentence, by the sentence's id."""
    return f"{id}-window"


def window_of(document: Document) -> Document | None:
    """The text round a sentence, where there is one, as a document of the same node."""
    text = document.metadata.get(WINDOW)
    if not isinstance(text, str) or not text.strip() or text == document.text:
        return None
    origin = origin_of(document)
    more = {NODE: {ID: origin.node_id, SOURCE: [origin.source, origin.version]}}
    return Document(text, document.title, id=window_id(str(document.id)), metadata=more)


def is_fresh(id: str) -> bool:
    """Whether an id is a UUID made by a clock or at random, so that it says nothing of content."""
    try:
        found = UUID(id)
    except ValueError:
        return False
    return found.variant == RFC_4122 and found.version in _FRESH and id in (str(found), found.hex)


def _content_id(content: Document, node: BaseNode) -> str:
    """An id of title, text, metadata but for a file's dates, and the source, if that has a name."""
    metadata = {k: value for k, value in content.metadata.items() if k not in _DATES}
    source = node.ref_doc_id or ""
    named = [content.title, content.text, metadata, "" if is_fresh(source) else source]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]


def _more(node: BaseNode) -> dict[str, Any]:
    """What a node has besides text, a name and metadata, where it is not as usual."""
    more: dict[str, Any] = {}
    if isinstance(node, TextNode):
        facts = bounded(node.to_dict(exclude={"metadata"}), _its_metadata(node))
        usual, known = TextNode(text="").to_dict(), jsonable(facts)
        more = {key: known[key] for key in usual if key not in _OWN and known[key] != usual[key]}
    if is_fresh(node.node_id):
        more[ID] = node.node_id
    if source := node.source_node:
        more[SOURCE] = [source.node_id, source.hash]
    return {NODE: more} if more else {}


def _its_metadata(node: BaseNode) -> str:
    return f"the metadata of node {node.node_id!r} (title {title_of(node.metadata)!r})"


@contextmanager
def _finite(node: BaseNode) -> Iterator[None]:
    """`DocumentError` for metadata that holds itself, or is nested too deeply."""
    try:
        yield
    except DocumentError:
        raise
    except (RecursionError, ValueError) as error:  # pydantic's own "Circular reference" is one
        raise DocumentError(
            f"{_its_metadata(node)} holds itself, or is nested too deeply; flatten it"
        ) from error


def to_documents(
    nodes: Iterable[BaseNode | NodeWithScore], *, strict: bool = False
) -> list[Document]:
    """The passages of all nodes. Raises `DocumentError` for a node without text, saying which."""
    found = bare_nodes(nodes)
    for number, node in enumerate(found, 1):
        if not text_of(node).strip():
            raise DocumentError(
                f"node {number} of {len(found)} (id {node.node_id!r}, title "
                f"{title_of(node.metadata)!r}) has no text; leave it out"
            )
    return [to_document(node, strict=strict) for node in found]


def metadata_of(document: Document) -> dict[str, Any]:
    """The metadata of a document's node. A title that it lacks stands there as "title"."""
    metadata = {key: value for key, value in document.metadata.items() if key != NODE}
    if document.title and title_of(metadata) != document.title:
        metadata["title"] = document.title
    return metadata


def to_node(hit: Hit) -> NodeWithScore:
    """The node of a hit."""
    document = hit.document
    more = {ID: str(document.id), **document.metadata.get(NODE, {})}
    more.pop(SOURCE, None)
    node = TextNode.from_dict({**more, "text": document.text, "metadata": metadata_of(document)})
    return NodeWithScore(node=node, score=hit.score)


def title_of(metadata: Mapping[str, Any]) -> str:
    """The first title among `TITLE_KEYS` that is a string with something in it."""
    found = (metadata.get(key) for key in TITLE_KEYS)
    return next((value for value in found if isinstance(value, str) and value.strip()), "")
