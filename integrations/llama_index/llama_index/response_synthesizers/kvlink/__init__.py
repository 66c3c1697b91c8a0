"""The response synthesizer that hands nodes to KVLink as passages."""

from llama_index.response_synthesizers.kvlink.base import KVLinkSynthesizer

__all__ = ["KVLinkSynthesizer"]
