"""Errors of this integration: kvlink_rag's, and of the kind that LangChain's callers expect.

Knows no models.
"""

from __future__ import annotations

from kvlink_rag.errors import ConfigError, KVLinkError


class UnknownArgument(ConfigError, TypeError):
    """An argument that would do nothing."""


class NotSupported(KVLinkError, NotImplementedError):
    """What LangChain offers and these models cannot do; the message says what to use."""
