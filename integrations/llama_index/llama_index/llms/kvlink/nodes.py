"""LlamaIndex nodes and kvlink_rag documents, one as the other.

A passage is the node's bare text; its title comes from the metadata; what is not JSON in the
metadata becomes text, or is an error (`strict`). What else LlamaIndex knows of a node (excluded
keys, relationships, places in its source) stands in the document's metadata under `NODE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, TextNode

from kvlink_rag.documents import Document, Hit, as_json, jsonable
from kvlink_rag.errors import DocumentError

TITLE_KEYS = ("title", "file_name")  # the first that is there is a passage's title
NODE = "_node"
_OWN = ("id_", "text", "metadata", "embedding", "class_name", "hash")  # kept otherwise, or derived


def to_document(node: BaseNode | NodeWithScore, *, strict: bool = False) -> Document:
    """The passage of a node: bare text, the node's id, a title, metadata that is JSON.

    Raises `DocumentError` for what is no node; with `strict`, for metadata that is not JSON too.
    """
    node = bare(node)
    metadata = node.metadata if strict else as_json(node.metadata)
    document = Document(
        text_of(node),
        title=title_of(node.metadata),
        id=node.node_id or None,
        metadata={**metadata, **_more(node)},
    )
    document.canonical()  # DocumentError where the metadata is not JSON
    return document


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


def _more(node: BaseNode) -> dict[str, Any]:
    """What a text node has besides text, id and metadata, where it is not as usual."""
    if not isinstance(node, TextNode):
        return {}
    usual, known = TextNode(text="").to_dict(), jsonable(node.to_dict())
    more = {key: known[key] for key in usual if key not in _OWN and known.get(key) != usual[key]}
    return {NODE: more} if more else {}


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


def to_node(hit: Hit) -> NodeWithScore:
    """The node of a hit. A title that the metadata lacks stands there as "title"."""
    document = hit.document
    metadata = dict(document.metadata)
    if document.title and title_of(metadata) != document.title:
        metadata["title"] = document.title
    more = metadata.pop(NODE, {})
    node = TextNode.from_dict(
        {**more, "id_": str(document.id), "text": document.text, "metadata": metadata}
    )
    return NodeWithScore(node=node, score=hit.score)


def title_of(metadata: Mapping[str, Any]) -> str:
    """The first title among `TITLE_KEYS` that is a string with something in it."""
    found = (metadata.get(key) for key in TITLE_KEYS)
    return next((value for value in found if isinstance(value, str) and value.strip()), "")
