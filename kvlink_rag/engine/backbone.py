"""The transformers model: the only module that knows its classes, hooks and cache.

Gives the engine five things: rotary tables, a forward pass with visibility by position, capture of
keys before RoPE, an empty live cache, and a fingerprint. Knows nothing of prompts, files or text.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvlink_rag.disk.digests import module_digest, weights_digest
from kvlink_rag.disk.huge_pages import prefer_huge
from kvlink_rag.errors import ModelNotSupported
from kvlink_rag.prompt.layout import visibility

from .attention import NAME as GROUPED
from .attention import pack_mask
from .device import Mark, Side
from .rope import rotate_into

if TYPE_CHECKING:
    from .workspaces import Workspace, Workspaces

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
SPARE_FACTOR = 4  # how much larger than needed a live cache's memory may be
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class LiveCache(Cache):  # type: ignore[misc]
    """The cache of one running prompt, with the position and segment of each entry.

    Entries may stand in any order; `positions` and `segments` (int64 [entries], on the device)
    say where in the prompt each one belongs. Never shared, never stored.
    workspace: whose buffers it fills and whose forward it takes, or None. ready: for each group of
    layers there, when its entries are in place; empty where they are.
    """

    workspace: Workspace | None = None
    ready: Sequence[Mark] = ()

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, segments: Tensor) -> None:
        """keys, values: [layers, kv_heads, capacity, head_dim], filled up to len(positions)."""
        length = len(positions)
        layers = zip(keys.unsqueeze(1), values.unsqueeze(1), strict=True)
        super().__init__(layers=[LiveLayer(k, v, length) for k, v in layers])
        self.buffers = (keys, values)  # valid until the cache grows past its capacity
        self.positions, self.segments = positions, segments

    def entries(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the entries at `places` (int64 [n], on the device).

        Keys (after RoPE) and values, each [layers, kv_heads, n, head_dim].
        """
        keys = torch.stack([layer.keys[0].index_select(1, places) for layer in self.layers])
        values = torch.stack([layer.values[0].index_select(1, places) for layer in self.layers])
        return keys, values


def cache_of(layers: Sequence[LiveLayer]) -> Cache:
    """A cache of such layers as the model takes it, for several prompts at once."""
    return Cache(layers=list(layers))


Choose = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """What `run_layer` takes beside the hidden states."""

    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    masks: Any

    def mask(self, config: Any, number: int) -> Tensor | None:
        """The mask of layer `number`."""
        masks = self.masks
        mask: Tensor | None = (
            masks[config.layer_types[number]] if isinstance(masks, dict) else masks
        )
        return mask


class Capture(threading.local):
    """Where this thread's hooks put keys before RoPE and values; None when not capturing.

    given: what they put in place of those of some tokens, or None.
    """

    keys: list[Tensor] | None = None
    values: list[Tensor] | None = None
    given: _Given | None = None


@dataclass(frozen=True, slots=True)
class _Given:
    """Keys before RoPE and values of the tokens at `places`: [layers, kv_heads, n, head_dim]."""

    places: Tensor
    keys: Tensor
    values: Tensor

    def instead(self, states: Tensor, output: Tensor) -> Tensor:
        """`output` of one layer's hook, [1, tokens, …], with `states` of that layer put in."""
        changed = output.clone()
        kv_heads, _, head_dim = states.shape
        changed.view(output.shape[1], kv_heads, head_dim)[self.places] = states.transpose(0, 1)
        return changed


class Backbone:
    """A causal LM of a supported architecture, in eval mode.

    source: the directory the weights came from, if any: then their file digests are the
    fingerprint, else the parameters themselves are hashed once. adapter: the digest of what was
    merged into them since, or "".
    Raises `ModelNotSupported` for other architectures and RoPE types.
    """

    def __init__(
        self, model: PreTrainedModel, source: Path | None = None, adapter: str = ""
    ) -> None:
        self.config = model.config
        check_supported(self.config)
        self.model = model.eval()
        self.source, self.adapter = source, adapter
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.layers: int = self.config.num_hidden_layers
        self.kv_heads: int = self.config.num_key_value_heads
        self.head_dim: int = (
            getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads
        )
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.window: int = self.config.max_position_embeddings
        self.side = Side(self.device)
        self.workspaces: Workspaces | None = None  # the plain forward alone
        self._capture = Capture()
        self._install_hooks()
        self._parameters = list(self.model.parameters())
        self._loaded = self._changes()
        self._known: tuple[int, str] | None = None
        self._spare: tuple[Tensor, Tensor] | None = None
        self._spare_lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights and everything in the configuration that shapes the keys.

        Computed once, and again where training or `load_state_dict` has changed the weights since.
        """
        changes = self._changes()
        if self._known is None or self._known[0] != changes:
            self._known = (
                changes,
                self._fingerprint(self.source if changes == self._loaded else None),
            )
        return self._known[1]

    def _changes(self) -> int:
        """How often the parameters were changed in place, as torch counts it."""
        return sum(0 if p.is_inference() else p._version for p in self._parameters)

    def _fingerprint(self, source: Path | None) -> str:
        weights = weights_digest(source) + self.adapter if source else module_digest(self.model)
        names = [
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "hidden_act",
            "attention_bias",
            "mlp_bias",
            "sliding_window",
            "layer_types",
            "rope_parameters",
        ]
        shape = {name: getattr(self.config, name, None) for name in names}
        text = json.dumps([weights, shape], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in the model's dtype."""
        return int(2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize)

    def synchronize(self) -> None:
        """Wait for what this thread told the device, so that a clock read afterwards is true.

        Not for the whole device, which would break a graph that another thread records.
        """
        if self.device.type == "cuda":
            self.side.join()
            torch.cuda.current_stream(self.device).synchronize()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of int64 `positions` [tokens]: each [tokens, head_dim], model dtype."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self.model.model.rotary_emb(probe, positions.to(self.device)[None])
        return cos[0], sin[0]

    def new_cache(self, positions: Tensor, segments: Tensor, capacity: int) -> LiveCache:
        """A live cache whose first entries, at these positions, are still to be filled."""
        capacity = max(capacity, len(positions))
        keys, values = self._take_spare(capacity) or self._fresh(capacity)
        return LiveCache(keys, values, positions.to(self.device), segments.to(self.device))

    def give_back(self, cache: LiveCache) -> None:
        """End a live cache that nothing else looks at; on a CPU the next one gets its memory.

        Pages that are touched for the first time cost more than what is written to them. One
        cache's memory is kept, the latest; GPUs have an allocator that keeps theirs.
        """
        keys, values = cache.buffers
        grown = any(layer.keys.shape[2] != keys.shape[2] for layer in cache.layers)
        if self.device.type != "cpu" or cache.workspace is not None or grown:
            return
        cache.layers = []
        with self._spare_lock:
            self._spare = (keys, values)

    def _take_spare(self, capacity: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a cache given back that hold `capacity` entries, if there are any."""
        with self._spare_lock:
            spare = self._spare
            if spare is None or not capacity <= spare[0].shape[2] <= SPARE_FACTOR * capacity:
                return None
            self._spare = None
            return spare

    def _fresh(self, capacity: int) -> tuple[Tensor, Tensor]:
        """New memory for keys and values: [layers, kv_heads, capacity, head_dim] each."""
        shape = (self.layers, self.kv_heads, capacity, self.head_dim)
        with torch.inference_mode(False):  # a later cache may be written to outside that mode
            keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in "kv")
        for buffer in (keys, values):
            prefer_huge(buffer)
        return keys, values

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        cache: LiveCache | None = None,
        *,
        keep: int = 1,
    ) -> Tensor:
        """Run over `token_ids` (int64 [tokens]) and append them to `cache`; visibility by position.

        Returns float32 logits [keep, vocabulary] of the last `keep` tokens.
        """
        if cache is not None and cache.workspace is not None:
            logits = cache.workspace.forward(token_ids, positions, segments, cache, keep)
            if logits is not None:
                return logits
        ids, at, seg = (t.to(self.device) for t in (token_ids, positions, segments))
        key_at, key_seg = at, seg
        if cache is not None:
            cache.positions = key_at = torch.cat([cache.positions, at])
            cache.segments = key_seg = torch.cat([cache.segments, seg])
        causal = _is_causal(positions, segments, len(key_at))  # as given: nothing waits for a GPU
        output = self.model(
            input_ids=ids[None],
            position_ids=at[None],
            past_key_values=cache,
            attention_mask=self._masks(at, seg, key_at, key_seg, causal),
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def recompute(
        self, token_ids: Tensor, places: Tensor, cache: LiveCache, choose: Choose | None = None
    ) -> Tensor:
        """Run causally over tokens that have their entries in `cache`, and write these again.

        token_ids, places: int64 [tokens], in order of position; the entries of `cache` stand in
        that order too. choose: which of the tokens go on after the first layer (int64 indices, in
        order, the last one among them), told the second layer's keys after RoPE and values, each
        [kv_heads, tokens, head_dim]. Returns float32 logits [vocabulary] of the last token.
        """
        places = places.to(self.device)
        hidden = self.embed(token_ids.to(self.device))
        step = self._recomputing(places, cache)
        for number, layer in enumerate(self.model.model.layers):
            if choose is not None and number == 1:
                going = choose(*self._states(layer, hidden, step.rotary)).to(self.device)
                hidden, places = hidden[:, going], places[going]
                step = self._recomputing(places, cache)
            hidden = self.run_layer(number, hidden, step, cache, places)
        return self.head(hidden[:, -1])

    def _recomputing(self, places: Tensor, cache: LiveCache) -> Step:
        at, none = cache.positions[places], torch.zeros_like(cache.positions)
        causal = _is_causal(at, none[places], len(none))
        return self.step(at, cache.positions, none, causal=causal)

    # The forward in pieces.

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [1, tokens, hidden_size] of int64 [tokens] on the device."""
        return self.model.model.embed_tokens(token_ids[None])  # type: ignore[no-any-return]

    def step(self, at: Tensor, key_at: Tensor, key_seg: Tensor, *, causal: bool = False) -> Step:
        """What the layers take for computed tokens at positions `at` over the entries of a cache.

        All int64 on the device: at [tokens], key_at and key_seg [entries], positions and segments
        of what the cache holds, these tokens among them. causal: see `_is_causal`.
        """
        masks = self._masks(at, torch.zeros_like(at), key_at, key_seg, causal)
        cos, sin = self.rotary(at)
        return Step(at, (cos[None], sin[None]), masks)

    def run_layer(
        self, number: int, hidden: Tensor, step: Step, cache: LiveCache, places: Tensor
    ) -> Tensor:
        """Layer `number` over `hidden`, whose entries in `cache` at `places` it writes."""
        live = cache.layers[number]
        live.places = places
        try:
            return self.model.model.layers[number](  # type: ignore[no-any-return]
                hidden,
                attention_mask=step.mask(self.config, number),
                position_ids=step.positions[None],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=step.rotary,
            )
        finally:
            live.places = None

    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits [vocabulary] of the hidden state [1, hidden_size] of one token."""
        return self.model.lm_head(self.model.model.norm(hidden))[0].float()  # type: ignore[no-any-return]

    def _states(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values that `layer` makes: [kv_heads, tokens, head_dim] each."""
        attention, states = layer.self_attn, layer.input_layernorm(hidden)[0]
        shape = (len(states), self.kv_heads, self.head_dim)
        keys, values = (p(states).view(shape) for p in (attention.k_proj, attention.v_proj))
        keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        turned = torch.empty_like(keys)
        rotate_into(turned, keys, rotary[0][0], rotary[1][0])
        return turned, values

    @torch.inference_mode()
    def capture(self, token_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys before RoPE and values of a batch of passages, each alone from position 0.

        token_ids: int64 [batch, tokens], padded on the right (padding comes later than every real
        token, so causal attention never shows it to one). Returns two lists of one tensor
        [batch, tokens, kv_heads, head_dim] a layer.
        """
        with self._capturing() as capture:
            self.model.model(input_ids=token_ids.to(self.device), use_cache=False)
        shape = (*token_ids.shape, self.kv_heads, self.head_dim)
        return [k.view(shape) for k in capture[0]], [v.view(shape) for v in capture[1]]

    @contextmanager
    def giving(self, places: Tensor, keys: Tensor, values: Tensor) -> Iterator[None]:
        """Until the end of the block, forwards give the tokens at `places` these keys and values.

        places: int64 [n], indices of the token ids of the forward. keys before RoPE, values:
        [layers, kv_heads, n, head_dim]. A masked prefill over given states is the oracle of
        snapshots that are not exact.
        """
        self._capture.given = _Given(*(t.to(self.device) for t in (places, keys, values)))
        try:
            yield
        finally:
            self._capture.given = None

    def _masks(self, at: Tensor, seg: Tensor, key_at: Tensor, key_seg: Tensor, causal: bool) -> Any:
        """The attention masks [1, 1, queries, keys]: one, or one for each kind of layer."""
        window = self._sliding_window()
        if window is None and causal:
            return None  # transformers' own causal attention, without a mask in memory
        everywhere = visibility(at, seg, key_at, key_seg)
        if window is None:
            mask = self._mask(everywhere)
            return mask if self._one_mask else {"full_attention": mask}
        near = self._mask(visibility(at, seg, key_at, key_seg, window=window))
        if self._one_mask:
            return near
        return {"full_attention": self._mask(everywhere), "sliding_attention": near}

    @property
    def _one_mask(self) -> bool:
        """Whether all layers of this architecture take one and the same mask."""
        return _takes_one_mask(self.config)

    def _mask(self, seen: Tensor) -> Tensor:
        """bool [queries, keys] in the form that this model's attention takes."""
        if self.config._attn_implementation == GROUPED:
            groups = self.config.num_attention_heads // self.kv_heads
            return pack_mask(seen, groups, self.dtype)
        return seen[None, None]

    def _sliding_window(self) -> int | None:
        """The window in positions, or None where no layer slides."""
        return _window_of(self.config)

    @contextmanager
    def _capturing(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        lists: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._capture.keys, self._capture.values = lists
        try:
            yield lists
        finally:
            self._capture.keys = self._capture.values = None

    def _install_hooks(self) -> None:
        """Keys are taken where RoPE is applied to them next: after k_norm if there is one."""
        capture = self._capture

        def keep(name: str, number: int, output: Tensor) -> Tensor | None:
            if (kept := getattr(capture, name)) is not None:
                kept.append(output)
            if (given := capture.given) is None:
                return None
            return given.instead(getattr(given, name)[number], output)

        for number, layer in enumerate(self.model.model.layers):
            attention = layer.self_attn
            keys = getattr(attention, "k_norm", attention.k_proj)
            for name, module in (("keys", keys), ("values", attention.v_proj)):
                hook = partial(keep, name, number)
                module.register_forward_hook(lambda _, __, output, hook=hook: hook(output))


def _is_causal(at: Tensor, seg: Tensor, keys: int) -> bool:
    """Whether plain causal attention is right: one computed token, or a whole computed prompt."""
    if bool(seg.any()):
        return False
    return len(at) == 1 or (len(at) == keys and bool((at.diff() > 0).all()))


def masks_by_layer(config: Any, make: Callable[[int | None], Any]) -> Any:
    """What a model takes as attention mask: `make(window)`, or one for each kind of layer.

    make: the mask for a sliding window in positions, or for None.
    """
    window = _window_of(config)
    if _takes_one_mask(config):
        return make(window)
    masks = {"full_attention": make(None)}
    return masks if window is None else {**masks, "sliding_attention": make(window)}


def _takes_one_mask(config: Any) -> bool:
    return config.model_type in ("llama", "mistral")


def _window_of(config: Any) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if config.model_type == "llama" or (kinds and "sliding_attention" not in kinds):
        return None
    return window


def check_supported(config: Any) -> None:
    """Raise `ModelNotSupported` unless reuse is proved for this configuration."""
    if config.model_type not in ARCHITECTURES:
        raise ModelNotSupported(
            f"found a model of type {config.model_type!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; reuse is proved for these only"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or any(isinstance(value, dict) for value in rope.values()):
        raise ModelNotSupported(
            f"found RoPE type {kind!r}, expected one of {', '.join(ROPE_TYPES)}: stored keys can "
            "only be re-encoded where the frequencies do not depend on the prompt's length"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelNotSupported("found a partial rotary factor, expected RoPE over whole heads")


def pad_batch(passages: Sequence[Sequence[int]]) -> Tensor:
    """int64 [batch, longest], padded on the right with id 0."""
    longest = max(len(ids) for ids in passages)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in passages])
