"""The retriever of a KVLink collection."""

from llama_index.retrievers.kvlink.base import KVLinkRetriever

__all__ = ["KVLinkRetriever"]
