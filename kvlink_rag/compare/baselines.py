"""Other ways to the first token, on the same model: what reuse with link tokens is compared with.

    ways = Baselines(model, snapshots)               # any `SnapshotSource`; None: encode now
    started = ways.start("cacheblend", parts)        # prompt, cache, logits, computed_tokens
    started.logits                                   # float32 [vocab] of the next token
    ways.generate("epic", parts, max_new_tokens=32)  # the greedy answer

    full         causal attention over the whole prompt, nothing reused
    prefix       as full, but the longest beginning that an earlier prompt of this object had is
                 reused, in whole blocks (prefix caching, as vLLM does it)
    naive        the passages' caches side by side, positions re-encoded; nothing else
    cacheblend   naive, and the `fraction` of passage tokens whose second-layer keys and values
                 deviate most is computed again with full attention (CacheBlend, Yao et al.,
                 arXiv 2405.16444, section 4: the first layer is computed in full to find them;
                 chosen once, as the authors' code does, not narrowed further layer by layer)
    epic         naive, and the first `first_tokens` tokens of each passage are computed again
                 (EPIC's LegoLink, Hu et al., arXiv 2410.15332)

All five take the same prompt: the spec's templates without link tokens and memory markers. The
last three keep the text before the first passage (the system prompt) for prompts that begin alike,
as reuse with link tokens does. At `fraction=1.0`, or more `first_tokens` than a passage has, the
last two give what `full` gives. Written from the papers; knows the engine and one model, no
collection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kvlink_rag.documents import Part
from kvlink_rag.engine.backbone import Choose
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.engine.text_pieces import TextPieces
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.decode import decode_one_token
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.prompt.layout import Layout, layout
from kvlink_rag.prompt.spec import Spec
from kvlink_rag.snapshots.kept_runs import Ids, Run, shared
from kvlink_rag.snapshots.sources import EncodeNow, SnapshotSource
from kvlink_rag.trace import Trace

Method = Literal["full", "prefix", "naive", "cacheblend", "epic"]
METHODS: tuple[Method, ...] = get_args(Method)
FRACTION = 0.15  # of passage tokens, CacheBlend's own choice
FIRST_TOKENS = 16  # of each passage; EPIC tries 2 to 32
BLOCK = 16  # tokens, vLLM's own choice
PROMPTS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Started:
    """A prompt after its prefill: float32 logits [vocab] of the next token, and the live cache.

    computed_tokens: tokens that ran through the model (beyond its first layer).
    """

    prompt: Layout
    cache: LiveCache
    logits: Tensor
    computed_tokens: int


class Baselines:
    """The five ways, on one model. Not for several threads at once.

    snapshots: where passages' keys and values come from. fraction: of the passages' tokens that
    "cacheblend" computes again. first_tokens: of each passage, that "epic" computes again.
    Raises `ConfigError` for values that cannot be.
    """

    def __init__(
        self,
        model: KVLinkModel,
        snapshots: SnapshotSource | None = None,
        *,
        fraction: float = FRACTION,
        first_tokens: int = FIRST_TOKENS,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ConfigError(f"fraction is {fraction}, expected a number from 0 to 1")
        if first_tokens < 0:
            raise ConfigError(f"first_tokens is {first_tokens}, expected 0 or more")
        self.model, self.backbone = model, model.backbone
        self.snapshots = snapshots or EncodeNow(model.backbone)
        self.fraction, self.first_tokens = fraction, first_tokens
        self._spec = plain_spec(model.spec)
        self._kept: list[tuple[Ids, Run]] = []  # earlier prompts of "prefix", the latest last
        self._head: tuple[Ids, Run] | None = None  # the latest text before a first passage

    def layout(self, parts: Iterable[Part]) -> Layout:
        """The prompt that all methods take: without link tokens and memory markers."""
        return layout(parts, self.model.tokenizer, self._spec)

    def start(self, method: Method, parts: Iterable[Part], *, room: int = 0) -> Started:
        """Prefill. room: entries of the cache to leave free for generated tokens."""
        prompt = self.layout(parts)
        if method == "full":
            return self._causal(prompt, room, None)
        if method == "prefix":
            return self._prefix(prompt, room)
        if method not in METHODS:
            raise ConfigError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
        cache = self._side_by_side(prompt, room)
        known = self._take_head(prompt, cache)
        if method == "cacheblend":
            started = self._cacheblend(prompt, cache, known)
        else:
            first = self.first_tokens if method == "epic" else 0
            started = self._recomputed(prompt, cache, _first_of_each(prompt, first, known))
        self._keep_head(started)
        return started

    def generate(self, method: Method, parts: Iterable[Part], *, max_new_tokens: int = 64) -> str:
        """The greedy answer; an end is ruled out until something visible was said."""
        started = self.start(method, parts, room=max_new_tokens)
        pieces, text, ends = TextPieces(self.model.tokenizer.decode), "", list(self.model.end_ids)
        logits = started.logits
        for count in range(max_new_tokens):
            if not pieces.visible and ends:
                logits = logits.clone()
                logits[ends] = -torch.inf
            token = int(logits.argmax())
            if token in ends:
                break
            text += pieces.push(token)
            if count + 1 < max_new_tokens:
                position = len(started.prompt) + count
                logits = decode_one_token(self.backbone, token, position, started.cache)
        return text + pieces.finish()

    def forget(self) -> None:
        """Drop the prompts that "prefix" has kept, and the text before a first passage."""
        self._kept.clear()
        self._head = None

    # The ways

    def _causal(self, prompt: Layout, room: int, begun: Run | None) -> Started:
        """Plain causal attention after the beginning that is known, if any."""
        known = 0 if begun is None else len(begun)
        at, none = prompt.positions, torch.zeros_like(prompt.segments)
        cache = self.backbone.new_cache(at[:known], none[:known], len(prompt) + room)
        if begun is not None:
            keys, values = cache.buffers
            keys[:, :, :known] = begun.keys
            values[:, :, :known] = begun.values
        logits = self.backbone.forward(prompt.token_ids[known:], at[known:], none[known:], cache)
        return Started(prompt, cache, logits[-1], len(prompt) - known)

    def _prefix(self, prompt: Layout, room: int) -> Started:
        """`full` after the longest known beginning; the last token is always computed."""
        ids = prompt.token_ids.numpy()
        found = [(shared(kept, ids[:-1]) // BLOCK * BLOCK, run) for kept, run in self._kept]
        count, run = max(found, key=lambda pair: pair[0], default=(0, None))
        started = self._causal(prompt, room, run.first(count) if run and count else None)
        keys, values = started.cache.buffers
        self._kept.append((ids, Run(keys[:, :, : len(ids)], values[:, :, : len(ids)])))
        del self._kept[:-PROMPTS_KEPT]
        return started

    def _side_by_side(self, prompt: Layout, room: int) -> LiveCache:
        """Every passage rotated to its place, in prompt order; the text's entries are empty."""
        passages = [prompt.passage_ids(span) for span in prompt.passages]
        snapshots = self.snapshots.fetch(passages, Trace())
        none = torch.zeros_like(prompt.segments)
        cache = self.backbone.new_cache(prompt.positions, none, len(prompt) + room)
        keys, values = cache.buffers
        cos, sin = self.backbone.rotary(prompt.positions)
        with torch.inference_mode():
            for span, snapshot in zip(prompt.passages, snapshots, strict=True):
                at = slice(span.start, span.stop)
                snapshot.fill(keys[:, :, at], values[:, :, at], cos[at], sin[at])
        return cache

    def _take_head(self, prompt: Layout, cache: LiveCache) -> int:
        """Put the kept text before the first passage in its place: how many tokens are known."""
        ids = prompt.token_ids[: _head(prompt)].numpy()
        if self._head is None or not np.array_equal(self._head[0], ids):
            return 0
        keys, values = cache.buffers
        keys[:, :, : len(ids)] = self._head[1].keys
        values[:, :, : len(ids)] = self._head[1].values
        return len(ids)

    def _keep_head(self, started: Started) -> None:
        """Keep it for the next prompt: it sees nothing but itself."""
        count = _head(started.prompt)
        if count:
            run = Run(*started.cache.entries(torch.arange(count, device=self.backbone.device)))
            self._head = started.prompt.token_ids[:count].numpy(), run

    def _recomputed(self, prompt: Layout, cache: LiveCache, computed: Tensor) -> Started:
        """Compute the tokens at `computed` (int64, sorted) with full attention."""
        logits = self.backbone.recompute(prompt.token_ids[computed], computed, cache)
        return Started(prompt, cache, logits, len(computed))

    def _cacheblend(self, prompt: Layout, cache: LiveCache, known: int) -> Started:
        """All tokens through the first layer, the text and those that deviate through the rest."""
        if self.backbone.layers < 2:
            raise ConfigError("found a model of one layer, expected two: the second one chooses")
        left = torch.arange(known, len(prompt))
        count = math.ceil(self.fraction * prompt.reused_tokens)
        choose = _most_deviating(prompt, cache, count, known)
        logits = self.backbone.recompute(prompt.token_ids[left], left, cache, choose)
        return Started(prompt, cache, logits, len(left) - prompt.reused_tokens + count)


def _head(prompt: Layout) -> int:
    """Tokens before the first passage; 0 where there is none."""
    return prompt.passages[0].start if prompt.passages else 0


def _most_deviating(prompt: Layout, cache: LiveCache, count: int, known: int) -> Choose:
    """All text, and the `count` passage tokens whose keys and values differ most from the cache's.

    Told of all tokens but the `known` first ones.
    The deviation of a token is the squared distance over all heads, keys and values together.
    """
    layer = cache.layers[1]
    passage = (prompt.segments[known:] != 0).to(cache.positions.device)

    def choose(keys: Tensor, values: Tensor) -> Tensor:
        held = (states[0, :, known : len(prompt)] for states in (layer.keys, layer.values))
        moved = [
            (new.float() - old.float()).square().sum(dim=(0, 2))
            for new, old in zip((keys, values), held, strict=True)
        ]
        deviation = (moved[0] + moved[1]).masked_fill(~passage, -1)  # text is not a candidate
        taken = ~passage
        taken[deviation.topk(count).indices] = True
        return taken.nonzero()[:, 0]

    return choose


def _first_of_each(prompt: Layout, count: int, known: int) -> Tensor:
    """Indices of the text after `known` and of the first `count` tokens of each passage, sorted."""
    taken = prompt.segments == 0
    taken[:known] = False
    for span in prompt.passages:
        taken[span.start : min(span.stop, span.start + count)] = True
    return taken.nonzero()[:, 0]


def plain_spec(spec: Spec) -> Spec:
    """`spec` without link tokens and memory markers: its templates and presets remain."""
    return replace(
        spec,
        links_per_passage=0,
        first_link_id=0,
        mem_start=None,
        mem_end=None,
        max_passages=None,
    )
