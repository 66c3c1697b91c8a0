"""The two forwards of an answer: over the prompt's computed tokens, then over one token a time.

Knows the backbone and token ids; knows no documents, no store and no text.
"""

from __future__ import annotations

from torch import Tensor

from kvlink_rag.engine.backbone import Backbone, Token
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.assemble import Assembled


def prefill(backbone: Backbone, prompt: Layout, assembled: Assembled) -> Tensor:
    """Run over the computed tokens, appending to the cache: float32 logits [vocab] of the next."""
    left = assembled.computed
    logits = backbone.forward(
        prompt.token_ids[left], prompt.positions[left], prompt.segments[left], assembled.cache
    )
    return logits[-1]


def masked_prefill(backbone: Backbone, prompt: Layout, cache: LiveCache) -> Tensor:
    """Run over every token, passages behind their headers: float32 logits [vocab] of the next.

    cache: empty; what is seen by what comes next is left in it, which headers are not.
    """
    whole = prompt.with_headers()
    logits = backbone.forward(whole.token_ids, whole.positions, whole.segments, cache)
    if whole is not prompt:
        cache.keep_only((cache.segments >= 0).nonzero()[:, 0])
    return logits[-1]


def decode_one_token(backbone: Backbone, token_id: int, position: int, cache: LiveCache) -> Tensor:
    """Append one generated token at `position`: float32 logits [vocab] of the next.

    Run together with the tokens that other threads append to caches of theirs.
    """
    return backbone.turns.step(cache, Token(token_id, position, cache))
