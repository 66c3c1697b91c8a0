"""Snapshots to a live cache: rotated to their positions and laid side by side.

Entries stand in the order passages, kept runs, computed tokens; visibility goes by position, so
any order would do. Knows tensors; knows no store. KVLink, arXiv 2502.16002, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Backbone, LiveCache
from .layout import Layout, Span
from .prefix import Run
from .snapshot import AnySnapshot


@dataclass(frozen=True, slots=True)
class Assembled:
    """A live cache that holds all that is reused, and what is left to compute.

    computed: int64 [tokens], the prompt indices still to run the model over, in order.
    """

    cache: LiveCache
    computed: Tensor


@torch.inference_mode()
def assemble(
    backbone: Backbone,
    prompt: Layout,
    snapshots: Sequence[AnySnapshot],
    runs: Mapping[int, Run],
    *,
    room: int = 0,
) -> Assembled:
    """Put one snapshot a passage and the kept `runs` (by span number) into a new live cache.

    snapshots: in the order of `prompt.passages`. A run may hold the beginning of its span only.
    room: entries to leave free for generated tokens.
    """
    begun = [(prompt.spans[i].start, len(run)) for i, run in runs.items()]
    kept = [Span(start, start + tokens) for start, tokens in begun]
    reused = prompt.passages + kept
    taken = _indices(reused)
    cache = backbone.new_cache(
        prompt.positions[taken], prompt.segments[taken], capacity=len(prompt) + room
    )
    keys, values = cache.buffers
    cos, sin = backbone.rotary(prompt.positions[taken])
    at = 0
    for snapshot in snapshots:
        stop = at + len(snapshot.token_ids)
        snapshot.fill(keys[:, :, at:stop], values[:, :, at:stop], cos[at:stop], sin[at:stop])
        at = stop
    for run in runs.values():
        stop = at + len(run)
        keys[:, :, at:stop].copy_(run.keys)
        values[:, :, at:stop].copy_(run.values)
        at = stop
    left = torch.ones(len(prompt), dtype=torch.bool)
    left[taken] = False
    return Assembled(cache, left.nonzero()[:, 0])


def _indices(spans: Sequence[Span]) -> Tensor:
    if not spans:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
