"""Repair at question time: some tokens of reused passages are computed again, seeing all before.

    first:N     the first N tokens of each passage (EPIC's LegoLink, Hu et al., arXiv 2410.15332)
    select:P%   of all passages' tokens those P % whose keys and values in the second layer differ
                most from the reused ones (CacheBlend, Yao et al., arXiv 2405.16444, section 4; the
                first layer is computed in full to find them, chosen once as in the authors' code)

What is computed again takes the place of the reused entry; the rest of a passage stays as it was
encoded, so it keeps what it saw. Link tokens, markers and text are computed in the same forward. At
100 %, or more first tokens than a passage has, this is the full prefill of the same layout.
Knows one prompt's tensors; knows no store and no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.arguments import Repair
from kvlink_rag.engine.backbone import Backbone, Choose
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.errors import ConfigError
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.kept_runs import Run
from kvlink_rag.snapshots.snapshot import Source


@dataclass(frozen=True, slots=True)
class Repaired:
    """A prompt after its prefill.

    cache: all of its entries, in prompt order. logits: float32 [vocab] of the next token.
    computed_tokens: tokens that ran through the model beyond its first layer; again: those of them
    that stand in passages.
    """

    cache: LiveCache
    logits: Tensor
    computed_tokens: int
    again: int


@torch.inference_mode()
def _side_by_side(
    backbone: Backbone,
    prompt: Layout,
    snapshots: Sequence[Source],
    runs: Mapping[int, Run],
    room: int,
) -> tuple[LiveCache, Tensor]:
    """A live cache with an entry for every token, in prompt order, and which of them are filled.

    snapshots: one a passage, rotated to its place. runs: kept ones by span number, each the
    beginning of its span. room: entries to leave free for generated tokens. Also returned: bool
    [tokens], True where something was put.
    """
    cache = backbone.new_cache(prompt.positions, prompt.segments, len(prompt) + room)
    keys, values = cache.buffers
    rotation = backbone.rotary(prompt.positions)
    filled = torch.zeros(len(prompt), dtype=torch.bool)
    places = [slice(span.start, span.stop) for span in prompt.passages]
    begun = [slice(prompt.spans[i].start, prompt.spans[i].start + len(r)) for i, r in runs.items()]
    sources: list[Source | Run] = [*snapshots, *runs.values()]
    for at, source in zip([*places, *begun], sources, strict=True):
        source.fill(keys[:, :, at], values[:, :, at], *rotation.part(at))
        filled[at] = True
    return cache, filled


def repaired(
    backbone: Backbone,
    prompt: Layout,
    snapshots: Sequence[Source],
    runs: Mapping[int, Run],
    repair: Repair,
    *,
    room: int = 0,
) -> Repaired:
    """Assemble and prefill under `repair`; arguments as in `_side_by_side`.

    runs: such as `exact_runs` leaves. Raises `ConfigError` where the model has one layer only and
    the second is to choose.
    """
    cache, filled = _side_by_side(backbone, prompt, snapshots, runs, room)
    passage = prompt.segments != 0
    if repair.share:
        left = (passage | ~filled).nonzero()[:, 0]
        again = math.ceil(repair.share * prompt.reused_tokens)
        choose = _most_deviating(backbone, passage[left], left, cache, again)
        computed = int((~filled).sum()) + again
    else:
        left = (~filled | heads(prompt, repair.first)).nonzero()[:, 0]
        again, choose, computed = int(passage[left].sum()), None, len(left)
    logits = backbone.recompute(prompt.token_ids[left], left, cache, choose)
    return Repaired(cache, logits, computed, again)


def heads(prompt: Layout, count: int) -> Tensor:
    """bool [tokens]: the first `count` tokens of each passage."""
    found = torch.zeros(len(prompt), dtype=torch.bool)
    for span in prompt.passages:
        found[span.start : min(span.stop, span.start + count)] = True
    return found


def exact_runs(prompt: Layout, runs: Mapping[int, Run], repair: Repair) -> dict[int, Run]:
    """Those of the kept runs (by span number) that are what this prompt would compute.

    Which tokens "select" chooses depends on all passages, so only what stands before them holds.
    """
    return {i: run for i, run in runs.items() if lasting(prompt, i, repair)}


def lasting(prompt: Layout, span: int, repair: Repair) -> bool:
    """Whether the run at `span` depends on nothing behind it, so that other prompts may share it.

    span: a number of `prompt.spans`, or one more than there are: the answer's.
    """
    if not repair.share or not prompt.passages:
        return True
    return span < len(prompt.spans) and prompt.spans[span].start < prompt.passages[0].start


def _most_deviating(
    backbone: Backbone, passage: Tensor, places: Tensor, cache: LiveCache, count: int
) -> Choose:
    """All text, and the `count` passage tokens whose keys and values differ most from the cache's.

    Told of the tokens at `places`, of which `passage` (bool, as many) says where they stand. The
    deviation is the squared distance over all heads, keys and values together.
    """
    if backbone.layers < 2:
        raise ConfigError("found a model of one layer, expected two: the second one chooses")
    layer = cache.layers[1]
    places, passage = places.to(backbone.device), passage.to(backbone.device)

    def choose(keys: Tensor, values: Tensor) -> Tensor:
        moved = [
            (new.float() - old[0, :, places].float()).square().sum(dim=(0, 2))
            for new, old in ((keys, layer.keys), (values, layer.values))
        ]
        deviation = (moved[0] + moved[1]).masked_fill(~passage, -1)  # text is not a candidate
        taken = ~passage
        taken[deviation.topk(count).indices] = True
        return taken.nonzero()[:, 0]

    return choose
