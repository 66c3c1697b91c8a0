"""The response synthesizer that hands nodes to KVLink as passages."""

from importlib.util import find_spec

from kvlink_rag.errors import MissingExtra

if find_spec("llama_index.core") is None:
    raise MissingExtra.of(
        "llama-index-core", "llama-index", "llama_index.response_synthesizers.kvlink"
    )

from llama_index.response_synthesizers.kvlink.base import KVLinkSynthesizer

__all__ = ["KVLinkSynthesizer"]
