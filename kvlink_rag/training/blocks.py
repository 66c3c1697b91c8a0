"""Attention in blocks for packed prompts: only where the visibility rule allows anything.

A packed prompt is mostly mutually blind: passages do not see each other, questions neither.
Tokens are laid in a row of three regions (the order in a cache is free, positions decide):

    bins of passage tokens | shared segment-0 tokens | bins of questions with their answers

and attention runs region by region, over about two fifths of the dense mask. The masks inside
the blocks are the packed prompt's `visible`; a test compares the whole with dense attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from .packing import Packed

NAME = "kvlink_blocks"
BIN = 128
SHARED_STEP = 32
ROWS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What is added to the scores inside the regions of a row: 0 where visible, else -inf
    (bfloat16).

    passages [batch, bins, bin, bin]; shared [batch, shared, bins * bin + shared]; tails [batch,
    tail bins, bin, bins * bin + shared + bin].
    """

    passages: Tensor
    shared: Tensor
    tails: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed prompts, int64 [batch, tokens]; targets are -100 where nothing is learned."""

    token_ids: Tensor
    positions: Tensor
    groups: Tensor
    targets: Tensor
    plan: Plan


def bins_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """First fit by decreasing length: indices, in bins that hold at most `size`; a longer one
    stands alone.
    """
    bins: list[list[int]] = []
    used: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((b for b, n in enumerate(used) if n + lengths[index] <= size), len(bins))
        if at == len(bins):
            bins.append([])
            used.append(0)
        bins[at].append(index)
        used[at] += lengths[index]
    return bins


def arrange(prompts: Sequence[Packed]) -> Batch:
    """Lay packed prompts in rows of one shape."""
    regions = [_regions(p) for p in prompts]
    bins, tails = (max(len(r[i]) for r in regions) for i in (0, 2))
    size = max(BIN, *(len(b) for r in regions for i in (0, 2) for b in r[i]))
    shared = -(-max(len(r[1][0]) for r in regions) // SHARED_STEP) * SHARED_STEP
    rows = [
        (_stack(r[0], bins, size), _stack(r[1], 1, shared)[0], _stack(r[2], tails, size))
        for r in regions
    ]
    order = [torch.cat([p.flatten(), s, t.flatten()]) for p, s, t in rows]
    return Batch(
        token_ids=_take([p.token_ids for p in prompts], order, 0),
        positions=_take([p.positions for p in prompts], order, 0),
        groups=_take([p.groups for p in prompts], order, 0),
        targets=_take([p.targets for p in prompts], order, -100),
        plan=_plan(prompts, rows),
    )


_Regions = tuple[list[Tensor], list[Tensor], list[Tensor]]
_Row = tuple[Tensor, Tensor, Tensor]


def _regions(prompt: Packed) -> _Regions:
    """Indices of the prompt's tokens: passages in bins, the shared tokens, questions in bins."""
    index = torch.arange(len(prompt))
    head = prompt.groups == 0
    shared = index[head & (prompt.segments == 0)]
    return _bins(prompt.segments * head), [shared], _bins(prompt.groups)


def _bins(labels: Tensor) -> list[Tensor]:
    """Indices of the tokens of each label from 1, several labels to a bin."""
    members = [torch.nonzero(labels == n)[:, 0] for n in range(1, int(labels.max()) + 1)]
    return [
        torch.cat([members[i] for i in each]) for each in bins_of([len(m) for m in members], BIN)
    ]


def _stack(indices: Sequence[Tensor], rows: int, size: int) -> Tensor:
    """int64 [rows, size], padded with -1."""
    stacked = torch.full((rows, size), -1)
    for row, index in zip(stacked, indices, strict=False):
        row[: len(index)] = index
    return stacked


def _take(values: Sequence[Tensor], order: Sequence[Tensor], filler: int) -> Tensor:
    return torch.stack(
        [torch.where(o < 0, filler, v[o]) for v, o in zip(values, order, strict=True)]
    )


def _plan(prompts: Sequence[Packed], rows: Sequence[_Row]) -> Plan:
    passages, shared, tails = [], [], []
    for prompt, (inside, common, groups) in zip(prompts, rows, strict=True):
        keys = torch.cat([inside.flatten(), common])
        passages.append(
            torch.stack([prompt.visible(b, b) for b in inside]) if len(inside) else _no_bins(inside)
        )
        shared.append(prompt.visible(common, keys))
        tails.append(torch.stack([prompt.visible(b, torch.cat([keys, b])) for b in groups]))
    return Plan(*(_bias(torch.stack(each)) for each in (passages, shared, tails)))


def _bias(seen: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.bfloat16)
    return torch.where(seen, zero, torch.full_like(zero, -torch.inf))


def _no_bins(inside: Tensor) -> Tensor:
    return torch.zeros(0, inside.shape[1], inside.shape[1], dtype=torch.bool)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
    """Attention of a batch of rows; all of it [batch, heads, tokens, head_dim]."""
    query = query * scale
    bins, size = plan.passages.shape[1:3]
    inside, known = bins * size, bins * size + plan.shared.shape[1]
    regions = slice(inside), slice(inside, known), slice(known, None)
    passages, shared, tails = (query[:, :, region] for region in regions)
    parts = [
        _binned(passages, key[:, :, :inside], value[:, :, :inside], plan.passages),
        _softmax(shared, key[:, :, :known], value[:, :, :known], plan.shared[:, None]),
        _tails(tails, key, value, known, plan.tails),
    ]
    return torch.cat(parts, dim=2)


def _binned(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Each bin attends to itself."""
    if not bias.shape[1]:
        return query
    q, k, v = (_fold(x, bias.shape[1]) for x in (query, key, value))
    return _unfold(_softmax(q, k, v, bias.flatten(0, 1)[:, None]), query)


def _tails(query: Tensor, key: Tensor, value: Tensor, known: int, bias: Tensor) -> Tensor:
    """Each bin of questions attends to the first `known` tokens and to itself; two rows at a
    time.
    """
    bins, parts = bias.shape[1], []
    for row in range(0, len(query), ROWS):
        rows = slice(row, row + ROWS)
        k, v = (
            torch.cat(
                [x[rows, :, :known].repeat_interleave(bins, 0), _fold(x[rows, :, known:], bins)],
                dim=2,
            )
            for x in (key, value)
        )
        seen = _softmax(_fold(query[rows], bins), k, v, bias[rows].flatten(0, 1)[:, None])
        parts.append(_unfold(seen, query[rows]))
    return torch.cat(parts)


def _softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention written out: with masks this small it trains twice as fast on a CPU as the fused
    kernel.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).add_(bias.to(query.dtype))
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def _fold(x: Tensor, bins: int) -> Tensor:
    """[batch, heads, bins * size, dim] to [batch * bins, heads, size, dim]."""
    batch, heads, tokens, dim = x.shape
    split = x.reshape(batch, heads, bins, tokens // bins, dim).transpose(1, 2)
    return split.reshape(batch * bins, heads, tokens // bins, dim)


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_fold`, to the shape of `like`."""
    batch, heads, tokens, dim = like.shape
    return (
        x.reshape(batch, -1, heads, x.shape[2], dim)
        .transpose(1, 2)
        .reshape(batch, heads, tokens, dim)
    )


def _interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: Plan,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [batch, heads, tokens, dim] in, [batch, tokens, heads,
    dim] out.
    """
    return attend(query, key, value, plan, scaling).transpose(1, 2), None


def _no_mask(*arguments: Any, **named: Any) -> None:
    return None


AttentionInterface.register(NAME, _interface)
AttentionMaskInterface.register(NAME, _no_mask)
