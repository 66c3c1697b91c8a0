"""Samples to rows, and rows to masks: what the model is given in one step.

Samples that share a row are groups 1, 2, …, blind to each other, each from position 0; group 0 is
padding. Who sees whom inside a group is `layout.sees`, as in inference. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlink_rag.engine.families import masks_by_layer
from kvlink_rag.prompt.layout import sees
from kvlink_rag.training.blocks import bins_of

from .samples import IGNORED, Encoded

STEP = 128  # rows are padded to a multiple: FlexAttention's block

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Collator:
    """Samples to a batch of int64 [rows, tokens]: ids, positions, segments, groups, labels.

    longest: the most tokens of a row that several samples share. pack: whether they share rows.
    """

    longest: int
    pack: bool

    def __call__(self, samples: Sequence[Encoded]) -> Batch:
        lengths = [len(sample) for sample in samples]
        bins = bins_of(lengths, self.longest) if self.pack else [[i] for i in range(len(samples))]
        rows = [[samples[i] for i in members] for members in bins]
        width = -(-max(sum(map(len, row)) for row in rows) // STEP) * STEP
        return {
            "input_ids": _rows([[s.token_ids for s in row] for row in rows], width, 0),
            "position_ids": _rows([[s.positions for s in row] for row in rows], width, 0),
            "segments": _rows([[s.segments for s in row] for row in rows], width, 0),
            "groups": _rows([_groups(row) for row in rows], width, 0),
            "labels": _rows([[s.labels for s in row] for row in rows], width, IGNORED),
        }


def _groups(row: Sequence[Encoded]) -> list[Tensor]:
    return [torch.full((len(sample),), number) for number, sample in enumerate(row, start=1)]


def _rows(rows: Sequence[Sequence[Tensor]], width: int, filler: int) -> Tensor:
    filled = torch.full((len(rows), width), filler)
    for line, pieces in zip(filled, rows, strict=True):
        joined = torch.cat(list(pieces))
        line[: len(joined)] = joined
    return filled


def dense_masks(config: Any, batch: Batch) -> Any:
    """What SDPA takes: bool [rows, 1, queries, keys], or one for each kind of layer."""
    at, segment, group = batch["position_ids"], batch["segments"], batch["groups"]

    def mask(window: int | None) -> Tensor:
        seen = sees(
            at[:, :, None], segment[:, :, None], at[:, None, :], segment[:, None, :], window=window
        )
        return (seen & (group[:, :, None] == group[:, None, :]))[:, None]

    return masks_by_layer(config, mask)


def block_masks(config: Any, batch: Batch) -> Any:
    """What FlexAttention takes: the same masks by blocks of 128, so that blind blocks cost nothing.

    FlexAttention: Dong et al., arXiv 2412.05496.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    at, segment, group = batch["position_ids"], batch["segments"], batch["groups"]
    rows, tokens = at.shape

    def mask(window: int | None) -> Any:
        def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = sees(
                at[row, query], segment[row, query], at[row, key], segment[row, key], window=window
            )
            return seen & (group[row, query] == group[row, key])

        return create_block_mask(rule, rows, None, tokens, tokens, device=at.device)

    return masks_by_layer(config, mask)
