"""A prompt prefilled for somebody else: the keys and values of all its tokens, in prompt order.

For engines that decode what was prefilled here. Knows one model's backbone and a layout; knows no
engine, and not how pages of keys and values are laid out anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kvlink_rag.arguments import UNREPAIRED
from kvlink_rag.engine.backbone import Backbone
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.trace import Trace

from .prompt_run import PromptRun


@dataclass(frozen=True, slots=True, eq=False)
class PromptStates:
    """All that a prompt leaves in a cache, token after token, and the logits that follow.

    keys (after RoPE), values: [layers, kv_heads, tokens, head_dim], copies on the model's device in
    its dtype. logits: float32 [vocab] of the next token, on the CPU.
    """

    keys: Tensor
    values: Tensor
    logits: Tensor
    trace: Trace


def prompt_states(backbone: Backbone, prompt: Layout, reuse: Reuse, trace: Trace) -> PromptStates:
    """Prefill `prompt` as for an answer; runs are kept for later prompts likewise.

    Never with repair, which leaves entries that no other engine could tell apart.
    """
    run = PromptRun(backbone, prompt, trace, replace(reuse, repair=UNREPAIRED))
    try:
        logits = run.start(room=0)
        if run.cache is None:
            raise RuntimeError("a prompt that was started has no cache")
        # The cache may stand in any order, and a workspace's has unwritten entries at its end.
        places = run.cache.positions.argsort()[: len(prompt)]
        keys, values = run.cache.entries(places)
    finally:
        run.end()
    return PromptStates(keys, values, logits.cpu(), trace)
