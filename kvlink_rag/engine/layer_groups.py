"""How a model's layers are grouped: copies and graphs go group by group. Knows numbers only."""

from __future__ import annotations

from itertools import pairwise

GROUPS = 8  # of layers, each one graph


def layer_groups(layers: int, groups: int) -> list[slice]:
    """`layers` in at most `groups` stretches, as even as can be."""
    if groups == 1:
        return [slice(None)]
    groups = min(groups, layers)
    ends = [layers * n // groups for n in range(groups + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]
