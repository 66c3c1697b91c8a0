"""Errors of this integration: kvlink_rag's, and of the kind that LlamaIndex's callers expect."""

from __future__ import annotations

from kvlink_rag.errors import ConfigError, KVLinkError


class KVLinkCallError(KVLinkError, RuntimeError):
    """A call that cannot be answered; `__cause__` is kvlink_rag's own error, if there is one.

    Not a `ValueError`: LlamaIndex's refine synthesizers take those for badly structured model
    output, log them and answer "Empty Response".
    """


class NotSupported(KVLinkCallError, NotImplementedError):
    """What LlamaIndex offers and these models cannot do; the message says what to use."""


class ArgumentError(ConfigError, TypeError):
    """An argument that is unknown, of another type, or does not go with another."""
