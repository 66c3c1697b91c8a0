"""What is learned: the answers given, the model's own answers under full attention, or both.

Knows logits and rows; no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from .samples import IGNORED

LEAST = -1e9  # a logit that is never taken; -inf would make the divergence of two such NaN


def loss_of(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    distill: float,
    never: Sequence[int],
) -> Tensor:
    """The loss, summed over answer tokens.

    logits, teacher: [n, vocabulary]; targets: int64 [n]. distill: the share of the divergence from
    `teacher` (Hinton et al., arXiv 1503.02531). never: ids that are left out of the vocabulary.
    """
    found = _only_base(logits, never).log_softmax(-1)
    loss = (1 - distill) * nll_loss(found, targets, reduction="sum")
    if teacher is None:
        return loss
    wanted = _only_base(teacher, never).log_softmax(-1)
    return loss + distill * kl_div(found, wanted, reduction="sum", log_target=True)


def _only_base(logits: Tensor, never: Sequence[int]) -> Tensor:
    """float32 logits over the base's vocabulary: link tokens and markers are never said."""
    inside = [i for i in never if i < logits.shape[-1]]
    ids = torch.tensor(inside, dtype=torch.int64, device=logits.device)
    return logits.float().index_fill(-1, ids, LEAST)


def full_attention(batch: dict[str, Tensor], special: Sequence[int]) -> dict[str, Tensor]:
    """The row as plain text: no passages, headers or `special` tokens, branches as they would be.

    Targets keep their order, so logits of both rows can be laid side by side.
    """
    ids, group = batch["input_ids"][0], batch["groups"][0]
    taken = torch.isin(ids, torch.tensor(list(special), dtype=ids.dtype, device=ids.device))
    header = batch["segments"][0] < 0
    taken &= (group > 0) & ~header  # headers take no positions
    before = taken.cumsum(0)
    first = torch.cat([group.new_ones(1, dtype=torch.bool), group[1:] != group[:-1]])
    at_start = (before - taken.long())[first]
    before = before - at_start[first.cumsum(0) - 1]  # of the same sample
    positions = batch["position_ids"][0] - before
    taken |= header
    row = {**batch, "position_ids": positions[None]}
    row["segments"] = torch.zeros_like(batch["segments"])
    row["labels"] = _handed_back(batch["labels"], taken)
    return {name: tensor[:, ~taken] for name, tensor in row.items()}


def _handed_back(labels: Tensor, taken: Tensor) -> Tensor:
    """`labels` with those of tokens that are taken out at the last token before that stays."""
    labels = labels.clone()
    for place in (taken & (labels[0] != IGNORED)).nonzero()[:, 0].tolist():
        stays = int((~taken[:place]).nonzero()[-1])
        labels[0, stays] = labels[0, place]
    return labels
