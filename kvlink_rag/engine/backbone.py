"""The transformers model: rotary tables, forwards with visibility by position, a fingerprint.

Also gives live caches and the keys before RoPE of passages. Knows the modules that models are
built of; knows nothing of prompts, files or text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlink_rag.disk.digests import FileStates
from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.disk.huge_pages import prefer_huge
from kvlink_rag.prompt.layout import visibility

from .attention import NAME as GROUPED
from .attention import pack_mask
from .capture import Capture, Hooks
from .copy_stream import CopyStream
from .families import check_supported, family_of, masks_by_layer, reach_of, window_of
from .identity import WeightsIdentity
from .live_cache import LiveCache, WorkspacePool, as_argument, cache_of_rows, undone
from .quick_weights import QuickWeights
from .rope import Rotation, rotate_into
from .turns import Turns

SPARE_FACTOR = 4  # how much larger than needed a live cache's memory may be

logger = logging.getLogger(__name__)

Choose = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """A generated token, and the live cache it is about to be appended to."""

    id: int
    position: int
    cache: LiveCache


@dataclass(frozen=True, slots=True)
class Step:
    """What `run_layer` takes beside the hidden states."""

    positions: Tensor
    rotary: Rotation
    masks: Any

    def turned(self, number: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for layer `number`: [1, tokens, turned] each, see `Rotation`."""
        cos, sin = self.rotary.of_layer(number)
        return cos[None], sin[None]

    def mask(self, config: Any, number: int) -> Tensor | None:
        """The mask of layer `number`."""
        masks = self.masks
        mask: Tensor | None = (
            masks[config.layer_types[number]] if isinstance(masks, dict) else masks
        )
        return mask


class Backbone:
    """A causal LM of a supported architecture, in eval mode.

    source, states: the directory the weights came from, if any, and the state of its files before
    they were loaded. adapter: the digest of what was merged into them since, or "". See `identity`.
    links: the digest of embeddings that were set besides and that no snapshot depends on, or "".
    Raises `ModelNotSupported` for other architectures and RoPE types.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Path | None = None,
        states: FileStates | None = None,
        adapter: str = "",
        links: str = "",
    ) -> None:
        self.config = model.config
        self.links = links
        check_supported(self.config)
        self.family = family_of(self.config)
        self.model = model.eval()
        self.source = source
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.layers: int = self.config.num_hidden_layers
        self.kv_heads: int = self.config.num_key_value_heads
        self.head_dim: int = (
            getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads
        )
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.window = reach_of(self.config)
        self.side = CopyStream(self.device)
        self.workspaces: WorkspacePool | None = None  # the plain forward alone
        self.quick: QuickWeights | None = None  # the model's own weights alone
        self._capture = Capture()
        attentions = (layer.self_attn for layer in self.model.model.layers)
        width = self.kv_heads * self.head_dim
        self._hooks = Hooks(attentions, self.family, width, self._capture)
        self._identity = WeightsIdentity(
            self.model, self.config, source, states, adapter, self.family.shaping
        )
        self.turns: Turns[Token, Tensor] = Turns(self._next_logits)
        self._spare: tuple[Tensor, Tensor] | None = None
        self._spare_lock = ForkSafeLock()

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the weights and all that shapes the keys; see `identity`."""
        return self._identity.fingerprint

    @property
    def dtype_name(self) -> str:
        """The dtype it computes in, without its module."""
        return str(self.dtype).removeprefix("torch.")

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

    def rotary(self, positions: Tensor) -> Rotation:
        """Cosines and sines of int64 `positions` [tokens], in the model's dtype."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        at, module = positions.to(self.device)[None], self.model.model.rotary_emb
        if self.family.ropes_by_kind:
            kinds = self.config.layer_types
            known = {kind: module(probe, at, kind) for kind in set(kinds)}
            cos, sin = (torch.stack([known[kind][i] for kind in kinds]) for i in (0, 1))
            return Rotation(cos, sin)
        cos, sin = (states[0] for states in module(probe, at))
        if (turns := self.family.turning_layers(self.config)) is None:
            return Rotation(cos, sin)
        ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
        return Rotation(
            torch.stack([cos if each else ones for each in turns])[:, None],
            torch.stack([sin if each else zeros for each in turns])[:, None],
        )

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
            attention_mask=self._masks(at, seg, key_at, key_seg, causal),
            use_cache=cache is not None,
            logits_to_keep=keep,
            **as_argument(cache, self.model),
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def _next_logits(self, tokens: Sequence[Token]) -> list[Tensor | Exception]:
        """What `turns` runs: the logits [vocabulary] after each token, or what went wrong there."""
        quick = self.quick.in_use() if self.quick else nullcontext()
        with quick, undone([token.cache for token in tokens]):  # Ctrl-C: all are asked again
            return self._after(tokens)

    def _after(self, tokens: Sequence[Token]) -> list[Tensor | Exception]:
        grouped = self.config._attn_implementation == GROUPED  # others know no rows
        if len(tokens) > 1 and grouped and all(t.cache.workspace is None for t in tokens):
            ids, at, caches = zip(*((t.id, t.position, t.cache) for t in tokens), strict=True)
            try:
                return list(self.forward_rows(ids, at, caches))
            except Exception as error:  # of one row, perhaps: each is asked alone
                logger.warning("a step of %d prompts together failed: %s", len(ids), error)
        return [self._alone(token) for token in tokens]

    def _alone(self, token: Token) -> Tensor | Exception:
        new, at = torch.tensor([token.id]), torch.tensor([token.position])
        try:
            return self.forward(new, at, torch.zeros(1, dtype=torch.int64), token.cache)[-1]
        except Exception as error:
            return error

    @torch.inference_mode()
    def forward_rows(
        self, token_ids: Sequence[int], positions: Sequence[int], caches: Sequence[LiveCache]
    ) -> Tensor:
        """Append one generated token to each cache: float32 logits [rows, vocabulary] of the next.

        None of the caches in a workspace. Where it fails, the caches are as they were.
        """
        with undone(caches):
            for cache, position in zip(caches, positions, strict=True):
                cache.append_entry(position)
            at = torch.tensor(positions, device=self.device)
            output = self.model(
                input_ids=torch.tensor(token_ids, device=self.device)[:, None],
                position_ids=at[:, None],
                # what rows see comes with their keys; this keeps transformers from making a mask
                attention_mask=masks_by_layer(self.config, lambda _: at.new_zeros(1, 1, 1, 1)),
                use_cache=True,
                **as_argument(cache_of_rows(caches, self._row_masks(at, caches)), self.model),
            )
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def _row_masks(self, at: Tensor, caches: Sequence[LiveCache]) -> list[list[Tensor | None]]:
        """For each layer and row what attention takes as mask; None where a row sees all."""
        if window_of(self.config) is None:
            return [[None] * len(caches)] * self.layers
        none = torch.zeros_like(at[:1])
        rows = [
            self._masks(at[i : i + 1], none, cache.positions, cache.segments, causal=True)
            for i, cache in enumerate(caches)
        ]
        return [
            [m[self.config.layer_types[n]] if isinstance(m, dict) else m for m in rows]
            for n in range(self.layers)
        ]

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
                going = choose(*self._states(layer, hidden, step.rotary.of_layer(number)))
                going = going.to(self.device)
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
        hidden: Tensor = self.model.model.embed_tokens(token_ids[None])
        scale = self.family.embeddings
        return hidden if scale is None else hidden * getattr(self.config, scale)

    def step(self, at: Tensor, key_at: Tensor, key_seg: Tensor, *, causal: bool = False) -> Step:
        """What the layers take for computed tokens at positions `at` over the entries of a cache.

        All int64 on the device: at [tokens], key_at and key_seg [entries], positions and segments
        of what the cache holds, these tokens among them. causal: see `_is_causal`.
        """
        masks = self._masks(at, torch.zeros_like(at), key_at, key_seg, causal)
        return Step(at, self.rotary(at), masks)

    def run_layer(
        self, number: int, hidden: Tensor, step: Step, cache: LiveCache, places: Tensor
    ) -> Tensor:
        """Layer `number` over `hidden`, whose entries in `cache` at `places` it writes."""
        live, layer = cache.layers[number], self.model.model.layers[number]
        live.places = places
        try:
            return layer(  # type: ignore[no-any-return]
                hidden,
                attention_mask=step.mask(self.config, number),
                position_ids=step.positions[None],
                use_cache=True,
                position_embeddings=step.turned(number),
                **as_argument(cache, layer),
            )
        finally:
            live.places = None

    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits [vocabulary] of the hidden state [1, hidden_size] of one token."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))[0]
        scale = self.family.logits
        return (logits if scale is None else logits / getattr(self.config, scale)).float()

    def _states(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values that `layer` makes: [kv_heads, tokens, head_dim] each."""
        norm, attention = self.family.input_norm, layer.self_attn
        states = (hidden if norm is None else getattr(layer, norm)(hidden))[0]
        shape = (len(states), self.kv_heads, self.head_dim)
        key_columns, value_columns = self.family.columns(self.kv_heads * self.head_dim)
        first, *rest = self.family.keys
        made = {name: getattr(attention, name)(states) for name in {first, self.family.values}}
        values = made[self.family.values][:, value_columns].view(shape).transpose(0, 1)
        keys = made[first][:, key_columns]
        keys = keys if self.family.over_heads else keys.view(shape)
        for name in rest:
            keys = getattr(attention, name)(keys)
        keys = keys.view(shape).transpose(0, 1)
        turned = torch.empty_like(keys)
        rotate_into(turned, keys, *rotary)
        return turned, values

    @torch.inference_mode()
    def capture(self, token_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys before RoPE and values of a batch of passages, each alone from position 0.

        token_ids: int64 [batch, tokens], padded on the right (padding comes later than every real
        token, so causal attention never shows it to one). Returns two lists of one tensor
        [batch, tokens, kv_heads, head_dim] a layer.
        """
        self._hooks.follow()
        with self._capture.capturing() as capture:
            self.model.model(input_ids=token_ids.to(self.device), use_cache=False)
        shape = (*token_ids.shape, self.kv_heads, self.head_dim)
        keys, values = capture
        if self.family.heads_first:
            keys = [k.transpose(1, 2) for k in keys]
        return [k.reshape(shape) for k in keys], [v.view(shape) for v in values]

    @contextmanager
    def giving(self, places: Tensor, keys: Tensor, values: Tensor) -> Iterator[None]:
        """Until the end of the block, forwards give the tokens at `places` these keys and values.

        places: int64 [n], indices of the token ids of the forward. keys before RoPE, values:
        [layers, kv_heads, n, head_dim]. A masked prefill over given states is the oracle of
        snapshots that are not exact.
        """
        self._hooks.follow()
        with self._capture.giving(*(t.to(self.device) for t in (places, keys, values))):
            yield

    def _masks(self, at: Tensor, seg: Tensor, key_at: Tensor, key_seg: Tensor, causal: bool) -> Any:
        """The attention masks [1, 1, queries, keys]: one, or one for each kind of layer."""
        if causal and window_of(self.config) is None:
            return None  # transformers' own causal attention, without a mask in memory

        def mask(window: int | None) -> Tensor:
            return self._mask(visibility(at, seg, key_at, key_seg, window=window))

        return masks_by_layer(self.config, mask)

    def _mask(self, seen: Tensor) -> Tensor:
        """bool [queries, keys] in the form that this model's attention takes."""
        if self.config._attn_implementation == GROUPED:
            groups = self.config.num_attention_heads // self.kv_heads
            return pack_mask(seen, groups, self.dtype)
        return seen[None, None]


def _is_causal(at: Tensor, seg: Tensor, keys: int) -> bool:
    """Whether plain causal attention is right: one computed token, or a whole computed prompt."""
    if bool(seg.any()):
        return False
    return len(at) == 1 or (len(at) == keys and bool((at.diff() > 0).all()))


def pad_batch(passages: Sequence[Sequence[int]]) -> Tensor:
    """int64 [batch, longest], padded on the right with id 0."""
    longest = max(len(ids) for ids in passages)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in passages])
