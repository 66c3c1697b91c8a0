"""Contriever as a LlamaIndex embedding."""

from llama_index.embeddings.contriever.base import ContrieverEmbedding

__all__ = ["ContrieverEmbedding"]
