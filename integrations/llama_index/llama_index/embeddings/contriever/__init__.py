"""Contriever as a LlamaIndex embedding."""

from importlib.util import find_spec

from kvlink_rag.errors import MissingExtra

if find_spec("llama_index.core") is None:
    raise MissingExtra.of("llama-index-core", "llama-index", "llama_index.embeddings.contriever")

from llama_index.embeddings.contriever.base import ContrieverEmbedding

__all__ = ["ContrieverEmbedding"]
