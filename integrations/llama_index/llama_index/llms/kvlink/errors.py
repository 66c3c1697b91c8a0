"""The error of a call that cannot be answered."""

from __future__ import annotations

from kvlink_rag.errors import KVLinkError


class KVLinkCallError(KVLinkError, RuntimeError):
    """A call that cannot be answered; `__cause__` is kvlink_rag's own error, if there is one.

    Not a `ValueError`: LlamaIndex's refine synthesizers take those for badly structured model
    output, log them and answer "Empty Response".
    """
