"""A handed-over prompt to keys and values: the one place where kvlink_rag computes.

Knows a collection and its model; knows neither pages nor requests.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from kvlink_rag import KVLinkModel, KVLinkRAG, PromptStates
from kvlink_rag.errors import PromptTooLong

from .handover import Handover

logger = logging.getLogger(__name__)


class Prefiller:
    """Snapshots of an open collection (its store, else its shared tier, else encoded now)."""

    def __init__(self, rag: KVLinkRAG) -> None:
        self.rag = rag

    @property
    def model(self) -> KVLinkModel:
        """The model that prefills."""
        return self.rag.model

    def states(self, handover: Handover) -> PromptStates:
        """Keys and values of all tokens of a prompt. Raises `KVLinkError`."""
        model, reuse = self.model, self.rag.reuse
        layout = handover.layout(tuple(model.spec.header))
        if len(layout) >= model.window:
            raise PromptTooLong(
                f"the prompt has {len(layout)} tokens, the window of the model that prefills is "
                f"{model.window}; use fewer or shorter passages"
            )
        if max(handover.token_ids) >= model.backbone.vocabulary:
            raise PromptTooLong(
                f"the prompt holds the token id {max(handover.token_ids)}, the model that prefills "
                f"has {model.backbone.vocabulary}; was it laid out for another model?"
            )
        # What others computed must not tell, by its speed, what they asked.
        mine = replace(reuse, scope=f"{reuse.scope} {handover.tenant}")
        states = model.states(layout, reuse=mine)
        logger.debug("prefilled %d tokens: %s", len(layout), states.trace)
        return states

    def close(self) -> None:
        """Close the collection."""
        self.rag.close()
