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

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kvlink_rag.arguments import Repair
from kvlink_rag.documents import Part
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.engine.text_pieces import TextPieces
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.decode import decode_one_token
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.model.repair import repaired
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
        self.snapshots = snapshots or EncodeNow(model.encoder)
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
        started = self._repaired(prompt, self._repair(method), room)
        self._keep_head(started)
        return started

    def generate(self, method: Method, parts: Iterable[Part], *, max_new_tokens: int = 64) -> str:
        """The greedy answer; an end is ruled out until something visible was said."""
        started = self.start(method, parts, room=max_new_tokens)
        pieces, text, ends = TextPieces(self.model.tokenizer.decode), "", list(self.model.end_ids)
        logits = started.logits
        for count in range(max_new_tokens):
            logits = logits.clone()
            logits[self.model.never_ids + ([] if pieces.visible else ends)] = -torch.inf
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

    def _repair(self, method: Method) -> Repair:
        """What the method computes again of reused passages."""
        if method == "cacheblend":
            return Repair(method, share=self.fraction)
        return Repair(method, first=self.first_tokens if method == "epic" else 0)

    def _repaired(self, prompt: Layout, repair: Repair, room: int) -> Started:
        """Passages side by side, `repair`, and the text after what is kept of it."""
        passages = [prompt.passage_ids(span) for span in prompt.passages]
        snapshots = self.snapshots.fetch(passages, Trace())
        runs = self._known_head(prompt)
        found = repaired(self.backbone, prompt, snapshots, runs, repair, room=room)
        return Started(prompt, found.cache, found.logits, found.computed_tokens)

    def _known_head(self, prompt: Layout) -> dict[int, Run]:
        """The kept text before the first passage, by span number, if it is this prompt's."""
        ids = prompt.token_ids[: _head(prompt)].numpy()
        if self._head is None or not np.array_equal(self._head[0], ids):
            return {}
        return _by_span(prompt, self._head[1])

    def _keep_head(self, started: Started) -> None:
        """Keep it for the next prompt: it sees nothing but itself."""
        count = _head(started.prompt)
        if count:
            run = Run(*started.cache.entries(torch.arange(count, device=self.backbone.device)))
            self._head = started.prompt.token_ids[:count].numpy(), run


def _head(prompt: Layout) -> int:
    """Tokens before the first passage; 0 where there is none."""
    return prompt.passages[0].start if prompt.passages else 0


def _by_span(prompt: Layout, head: Run) -> dict[int, Run]:
    """The run of the text before the first passage cut into runs of its spans."""
    spans = (s for s in enumerate(prompt.spans) if s[1].stop <= len(head))
    return {
        i: Run(head.keys[:, :, s.start : s.stop], head.values[:, :, s.start : s.stop])
        for i, s in spans
    }


def plain_spec(spec: Spec) -> Spec:
    """`spec` without link tokens and memory markers: its templates and presets remain."""
    return replace(
        spec,
        links_per_passage=0,
        first_link_id=0,
        links_shared=False,
        mem_start=None,
        mem_end=None,
        max_passages=None,
    )
