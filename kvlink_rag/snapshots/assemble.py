"""Snapshots to a live cache: rotated to their positions and laid side by side.

Entries stand in the order passages, kept runs, computed tokens; visibility goes by position, so
any order would do. Knows tensors; knows no store. KVLink, arXiv 2502.16002, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.engine.backbone import Backbone
from kvlink_rag.engine.layer_groups import GROUPS, layer_groups
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.prompt.layout import Layout, Span

from .kept_runs import Run
from .snapshot import Source


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
    snapshots: Sequence[Source],
    runs: Mapping[int, Run],
    *,
    room: int = 0,
) -> Assembled:
    """Put one snapshot a passage and the kept `runs` (by span number) into a new live cache.

    snapshots: in the order of `prompt.passages`. A run may hold the beginning of its span only.
    room: entries to leave free for generated tokens. On a GPU the cache is filled on the side
    stream, behind `cache.ready` where it is a workspace's, else before anything that comes next.
    """
    begun = [(prompt.spans[i].start, len(run)) for i, run in runs.items()]
    reused = prompt.passages + [Span(start, start + tokens) for start, tokens in begun]
    taken = _indices(reused)
    cache = _live_cache(backbone, prompt, taken, room)
    keys, values = cache.buffers
    arriving = any(getattr(snapshot, "arriving", False) for snapshot in snapshots)
    sources: list[Source | Run] = [*snapshots, *runs.values()]
    marks = []
    with backbone.side.work():
        rotation = backbone.rotary(prompt.positions[taken])
        for layers in layer_groups(backbone.layers, GROUPS if arriving else 1):
            at = 0
            for source, span in zip(sources, reused, strict=True):
                place = slice(at, at + len(span))
                turned = rotation.part(place, layers)
                source.part(layers).fill(keys[layers, :, place], values[layers, :, place], *turned)
                at = place.stop
            marks.append(backbone.side.mark())
    for run in runs.values():
        backbone.side.borrow(run.keys, run.values)
    if cache.workspace is None:
        backbone.side.wait(marks[-1])
    else:
        cache.ready = marks
    left = torch.ones(len(prompt), dtype=torch.bool)
    left[taken] = False
    return Assembled(cache, left.nonzero()[:, 0])


def _live_cache(backbone: Backbone, prompt: Layout, taken: Tensor, room: int) -> LiveCache:
    """One in a free workspace where that suits the prompt, else a new one."""
    positions, segments = prompt.positions[taken], prompt.segments[taken]
    capacity = len(prompt) + room
    if backbone.workspaces is not None:
        cache = backbone.workspaces.take(positions, segments, capacity, len(prompt) - len(taken))
        if cache is not None:
            return cache
    return backbone.new_cache(positions, segments, capacity)


def _indices(spans: Sequence[Span]) -> Tensor:
    if not spans:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
