"""KVLink for LlamaIndex: the LLM, and the transformation that registers nodes for it."""

from llama_index.llms.kvlink.base import KVLink
from llama_index.llms.kvlink.register import KVLinkRegister

__all__ = ["KVLink", "KVLinkRegister"]
