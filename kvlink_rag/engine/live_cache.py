"""Live caches: the keys and values of running prompts, in buffers that are filled in place.

Several may take part in one forward, a row each: no cache is copied or padded for it, and attention
is told each row's own (`ByRow`). The only module that knows transformers' cache classes. Knows no
model, no snapshot and no prompt; of what may stand behind a cache it knows two protocols.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .copy_stream import Mark


class CacheWorkspace(Protocol):
    """What a live cache may belong to: buffers of fixed capacity with forwards of their own."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, segments: Tensor, cache: LiveCache, keep: int
    ) -> Tensor | None:
        """See `Backbone.forward`; None where the plain forward has to go on with `cache`."""
        ...


class WorkspacePool(Protocol):
    """Where live caches in free workspaces come from."""

    def take(
        self, positions: Tensor, segments: Tensor, capacity: int, computed: int
    ) -> LiveCache | None:
        """A live cache in a free workspace, its first entries yet to be filled, or None.

        positions, segments: int64 [entries] of these on the CPU. capacity: entries in all.
        computed: tokens of the first forward.
        """
        ...

    def clear(self) -> None:
        """Drop the workspaces that are free."""
        ...


class LiveLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a live cache: a buffer filled in place, [1, kv_heads, capacity, head_dim].

    Always a full-attention layer: sliding windows are part of the mask, never of the cache.
    places: int64 [tokens], the entries that `update` writes over instead of appending, or None.
    """

    is_sliding = False
    places: Tensor | None = None

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, tokens, head_dim]; return everything so far, as views."""
        if self.places is not None:
            self.keys[:, :, self.places] = key_states
            self.values[:, :, self.places] = value_states
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:
            self._grow()
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _grow(self) -> None:
        shape = list(self.keys.shape)
        used, shape[2] = shape[2], max(self.length, 2 * shape[2])
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(shape)
            new[:, :, :used] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The first transformers 5 hand over the queries' places ([tokens]), not their number."""
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.length + new, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in the first transformers 5


class LiveCache(Cache):  # type: ignore[misc]
    """The cache of one running prompt, with the position and segment of each entry.

    Entries may stand in any order; `positions` and `segments` (int64 [entries], on the device)
    say where in the prompt each one belongs. Never shared, never stored.
    workspace: whose buffers it fills and whose forward it takes, or None. ready: for each group of
    layers there, when its entries are in place; empty where they are.
    """

    workspace: CacheWorkspace | None = None
    ready: Sequence[Mark] = ()

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, segments: Tensor) -> None:
        """keys, values: [layers, kv_heads, capacity, head_dim], filled up to len(positions)."""
        length = len(positions)
        layers = zip(keys.unsqueeze(1), values.unsqueeze(1), strict=True)
        super().__init__(layers=[LiveLayer(k, v, length) for k, v in layers])
        self.buffers = (keys, values)  # valid until the cache grows past its capacity
        self.positions, self.segments = positions, segments

    def append_entry(self, position: int) -> None:
        """Note the entry that a generated token at `position`, of segment 0, is about to take."""
        at = torch.tensor([position], device=self.positions.device)
        self.positions = torch.cat([self.positions, at])
        self.segments = torch.cat([self.segments, torch.zeros_like(at)])

    def truncate(self, length: int) -> None:
        """Forget all entries but the first `length`, which some layers may not be beyond."""
        self.positions, self.segments = self.positions[:length], self.segments[:length]
        for layer in self.layers:
            layer.length = min(layer.length, length)

    @torch.inference_mode()
    def keep_only(self, places: Tensor) -> None:
        """Forget all entries but those at `places` (int64 [n], on the device, ascending)."""
        self.positions, self.segments = self.positions[places], self.segments[places]
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[:, :, : len(places)] = states.index_select(2, places)
            layer.length = len(places)

    def entries(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the entries at `places` (int64 [n], on the device).

        Keys (after RoPE) and values, each [layers, kv_heads, n, head_dim].
        """
        keys = torch.stack([layer.keys[0].index_select(1, places) for layer in self.layers])
        values = torch.stack([layer.values[0].index_select(1, places) for layer in self.layers])
        return keys, values


@contextmanager
def undone(caches: Sequence[LiveCache]) -> Iterator[None]:
    """A block that, where it raises, leaves the caches as long as they were."""
    lengths = [len(cache.positions) for cache in caches]
    try:
        yield
    except BaseException:
        for cache, length in zip(caches, lengths, strict=True):
            cache.truncate(length)
        raise


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


def cache_of_rows(caches: Sequence[LiveCache], masks: Sequence[Sequence[Tensor | None]]) -> Cache:
    """The live caches of several prompts as one; masks: of each layer, for each row."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return Cache(layers=[_RowsLayer(each, m) for each, m in zip(layers, masks, strict=True)])


def cache_of(layers: Sequence[LiveLayer]) -> Cache:
    """A cache of such layers as the model takes it, for several prompts at once."""
    return Cache(layers=list(layers))


def as_argument(cache: Cache | None, module: torch.nn.Module) -> dict[str, Cache | None]:
    """`cache` under the name that the forward of `module` (a model or one layer) gives it.

    transformers calls it "cache" from 5.24 on and "past_key_values" before; a forward swallows the
    other name without a word, and is wrong.
    """
    return {_cache_name(type(module).forward): cache}


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
