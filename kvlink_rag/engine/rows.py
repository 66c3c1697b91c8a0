"""One forward over one new token of each of several prompts, every row over its own live cache.

Products with weights, which cost a decode step its time, run on all rows at once; attention runs
row by row, as it does alone, so no cache is copied or padded. Knows transformers' cache interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .live_cache import LiveCache, LiveLayer


@dataclass(frozen=True, slots=True)
class ByRow:
    """What attention sees of a layer: keys or values [1, kv_heads, entries, head_dim] of each row.

    masks: for each row what its attention takes as mask; None where it sees all its entries.
    """

    rows: Sequence[Tensor]
    masks: Sequence[Tensor | None]


class _RowsLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of several live caches."""

    is_sliding = False

    def __init__(self, layers: Sequence[LiveLayer], masks: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._layers, self._masks = layers, masks
        self.dtype, self.device = layers[0].dtype, layers[0].device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[ByRow, ByRow]:
        """Append [rows, kv_heads, 1, head_dim], to each row its own."""
        pairs = [
            layer.update(key_states[i : i + 1], value_states[i : i + 1])
            for i, layer in enumerate(self._layers)
        ]
        keys, values = zip(*pairs, strict=True)
        return ByRow(keys, self._masks), ByRow(values, self._masks)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Of the longest row; no mask is made from it."""
        return self.get_seq_length() + 1, 0

    def get_seq_length(self) -> int:
        return max(layer.length for layer in self._layers)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def rows_cache(caches: Sequence[LiveCache], masks: Sequence[Sequence[Tensor | None]]) -> Cache:
    """The live caches of several prompts as one; masks: of each layer, for each row."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return Cache(layers=[_RowsLayer(each, m) for each, m in zip(layers, masks, strict=True)])


class Mark:
    """How long some live caches are, to go back to where a forward failed on the way."""

    def __init__(self, caches: Sequence[LiveCache]) -> None:
        self._held = [
            (cache, cache.positions, cache.segments, [layer.length for layer in cache.layers])
            for cache in caches
        ]

    def go_back(self) -> None:
        """Forget what was appended since."""
        for cache, positions, segments, lengths in self._held:
            cache.positions, cache.segments = positions, segments
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.length = length


def new_entry(cache: LiveCache, position: int) -> None:
    """Note the entry that a generated token, at `position` and of segment 0, is about to take."""
    at = torch.tensor([position], device=cache.positions.device)
    cache.positions = torch.cat([cache.positions, at])
    cache.segments = torch.cat([cache.segments, torch.zeros_like(at)])
