"""The retriever of a KVLink collection."""

from importlib.util import find_spec

from kvlink_rag.errors import MissingExtra

if find_spec("llama_index.core") is None:
    raise MissingExtra.of("llama-index-core", "llama-index", "llama_index.retrievers.kvlink")

from llama_index.retrievers.kvlink.base import KVLinkRetriever

__all__ = ["KVLinkRetriever"]
