"""LlamaIndex nodes and kvlink_rag documents, one as the other.

A passage is the node's bare text; its title comes from the metadata; what is not JSON in the
metadata becomes text. What else LlamaIndex knows of a node (excluded keys, relationships, places in
its source) stands in the document's metadata under `NODE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, TextNode

from kvlink_rag.documents import Document, Hit

TITLE_KEYS = ("title", "file_name")  # the first that is there is a passage's title
NODE = "_node"
_OWN = ("id_", "text", "metadata", "embedding", "class_name", "hash")  # kept otherwise, or derived


def to_document(node: BaseNode | NodeWithScore) -> Document:
    """The passage of a node: bare text, the node's id, a title, metadata that is JSON."""
    if isinstance(node, NodeWithScore):
        node = node.node
    return Document(
        node.get_content(metadata_mode=MetadataMode.NONE),
        title=title_of(node.metadata),
        id=node.node_id or None,
        metadata={**jsonable(node.metadata), **_more(node)},
    )


def _more(node: BaseNode) -> dict[str, Any]:
    """What a text node has besides text, id and metadata, where it is not as usual."""
    if not isinstance(node, TextNode):
        return {}
    usual, known = TextNode(text="").to_dict(), jsonable(node.to_dict())
    more = {key: known[key] for key in usual if key not in _OWN and known.get(key) != usual[key]}
    return {NODE: more} if more else {}


def to_documents(nodes: Iterable[BaseNode | NodeWithScore]) -> list[Document]:
    """The passages of all nodes that have text."""
    documents = (to_document(node) for node in nodes)
    return [document for document in documents if document.text.strip()]


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
