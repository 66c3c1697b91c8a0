"""KVLink for LlamaIndex: the LLM, what registers nodes for it, and a vector store of its own."""

from importlib.util import find_spec

from kvlink_rag.errors import MissingExtra

if find_spec("llama_index.core") is None:
    raise MissingExtra.of("llama-index-core", "llama-index", "llama_index.llms.kvlink")

from llama_index.llms.kvlink.base import KVLink
from llama_index.llms.kvlink.register import KVLinkRegister
from llama_index.llms.kvlink.vector_store import KVLinkVectorStore

__all__ = ["KVLink", "KVLinkRegister", "KVLinkVectorStore"]
