"""Samples to a row, and a row to what attention needs: what the model is given in one step.

All samples of a step share one row, without padding where the device needs none: groups 1, 2, …,
blind to each other, each from position 0; group 0 is padding. Who sees whom inside a group is
`layout.sees`, as in inference. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvlink_rag.engine.families import masks_by_layer
from kvlink_rag.prompt.layout import sees, visibility

from .attention import Plan
from .samples import IGNORED, Encoded

FLEX_BLOCK = 128  # FlexAttention's block, of which a row must be a multiple

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Collator:
    """Samples to a batch of int64 [1, tokens]: ids, positions, segments, branches, groups, labels.

    labels: each token's target, see `Encoded`. multiple: of what the row's length is.
    """

    multiple: int = 1

    def __call__(self, samples: Sequence[Encoded]) -> Batch:
        width = -(-sum(map(len, samples)) // self.multiple) * self.multiple
        groups = [torch.full((len(sample),), n) for n, sample in enumerate(samples, start=1)]
        return {
            "input_ids": _row([s.token_ids for s in samples], width, 0),
            "position_ids": _row([s.positions for s in samples], width, 0),
            "segments": _row([s.segments for s in samples], width, 0),
            "branches": _row([s.branches for s in samples], width, 0),
            "groups": _row(groups, width, 0),
            "labels": _row([s.targets for s in samples], width, IGNORED),
        }


def _row(pieces: Sequence[Tensor], width: int, filler: int) -> Tensor:
    row = torch.full((1, width), filler)
    joined = torch.cat(list(pieces))
    row[0, : len(joined)] = joined
    return row


def plans(config: Any, batch: Batch) -> Any:
    """What `segmented_attention` takes: a `Plan`, or one for each kind of layer."""
    groups = config.num_attention_heads // config.num_key_value_heads
    return masks_by_layer(config, lambda window: _plan(batch, window, groups))


def _plan(batch: Batch, window: int | None, groups: int) -> Plan:
    """The runs of each sample, and who sees whom in them."""
    names = ("position_ids", "segments", "branches")
    _, sizes = _runs(batch["groups"][0])
    samples = zip(*(torch.split(batch[name][0], sizes) for name in names), strict=True)
    return [_sample_plan(at, seg, branch, window, groups) for at, seg, branch in samples]


def _runs(values: Tensor) -> tuple[list[int], list[int]]:
    """The values of runs of equal ones, and how long each is."""
    found, lengths = torch.unique_consecutive(values, return_counts=True)
    return found.tolist(), lengths.tolist()


def _sample_plan(
    at: Tensor, segment: Tensor, branch: Tensor, window: int | None, groups: int
) -> tuple[list[int], list[Tensor | None], Tensor]:
    def bias(queries: Any, keys: Any) -> Tensor:
        seen = visibility(
            at[queries],
            segment[queries],
            at[keys],
            segment[keys],
            window=window,
            branches=(branch[queries], branch[keys]),
        )
        zero = torch.zeros(seen.shape, device=at.device)
        return zero.masked_fill_(~seen, -torch.inf).repeat(groups, 1)

    kinds, lengths = _runs(segment.abs())  # a passage and its header
    stops = list(accumulate(lengths))
    runs = [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]
    passages = [bias(r, r) if kind else None for r, kind in zip(runs, kinds, strict=True)]
    return lengths, passages, bias(segment == 0, slice(None))


def block_masks(config: Any, batch: Batch) -> Any:
    """What FlexAttention takes: the same by blocks of 128, so that blind blocks cost nothing.

    FlexAttention: Dong et al., arXiv 2412.05496.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    at, segment, group = batch["position_ids"], batch["segments"], batch["groups"]
    branch = batch["branches"]
    rows, tokens = at.shape

    def mask(window: int | None) -> Any:
        def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = sees(
                at[row, query],
                segment[row, query],
                at[row, key],
                segment[row, key],
                window=window,
                branches=(branch[row, query], branch[row, key]),
            )
            return seen & (group[row, query] == group[row, key])

        return create_block_mask(rule, rows, None, tokens, tokens, device=at.device)

    return masks_by_layer(config, mask)
