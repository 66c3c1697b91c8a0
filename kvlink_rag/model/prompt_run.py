"""One prompt inside the model: its live cache, its first logits, one step a token.

    layout → snapshots → live cache (assembly) → prefill → decode

Knows tensors and token ids; snapshots come from a `SnapshotSource`, which alone knows whether there
is a store. Knows no text: `text_stream` makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvlink_rag.engine.backbone import Backbone
from kvlink_rag.engine.live_cache import LiveCache
from kvlink_rag.errors import DeviceMemoryError
from kvlink_rag.prompt.layout import Layout, Span
from kvlink_rag.snapshots.assemble import Assembled, assemble
from kvlink_rag.snapshots.encode import PassageEncoder
from kvlink_rag.snapshots.kept_runs import Run, chain_keys, chain_root, run_key
from kvlink_rag.snapshots.snapshot import Source
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.trace import Trace

from .decode import decode_one_token, masked_prefill, prefill
from .repair import exact_runs, lasting, repaired

logger = logging.getLogger(__name__)


class PromptRun:
    """One prompt on its way through the model: start, then one `step` a token."""

    def __init__(self, backbone: Backbone, prompt: Layout, trace: Trace, reuse: Reuse) -> None:
        self.backbone, self.prompt, self.trace, self.reuse = backbone, prompt, trace, reuse
        self.cache: LiveCache | None = None
        self._said: list[int] = []
        self._chain: list[str] = []

    def start(self, room: int) -> Tensor:
        """Prefill: logits [vocab] of the first token.

        A device without memory for it gets back what is kept there (runs, snapshots, workspaces)
        and is asked once more.
        Raises `DeviceMemoryError`.
        """
        try:
            return self._start(room)
        except torch.cuda.OutOfMemoryError as error:
            logger.warning("the device ran out of memory, kept runs are dropped: %s", error)
        self._give_back()
        try:
            return self._start(room)
        except torch.cuda.OutOfMemoryError as error:
            raise _out_of_memory(len(self.prompt), error) from error

    def _give_back(self) -> None:
        """Drop what is kept on the device."""
        self.cache = None
        if self.reuse.prefix is not None:
            self.reuse.prefix.clear()
        if self.reuse.memory is not None:
            self.reuse.memory.shrink()
        if self.backbone.workspaces is not None:
            self.backbone.workspaces.clear()
        torch.cuda.empty_cache()

    def _start(self, room: int) -> Tensor:
        trace, backbone = self.trace, self.backbone
        trace.passages, trace.dtype = len(self.prompt.passages), backbone.dtype_name
        trace.weights = "int8" if backbone.quick else ""
        if self.reuse.repair and trace.passages and trace.mode == "reuse":
            return self._repaired(room)
        if trace.mode == "reuse":  # a workspace's forward begins while snapshots still arrive
            assembled = self.assemble(room, wait=backbone.workspaces is None)
        else:
            assembled = self._nothing_reused(room)
        self.cache = assembled.cache
        trace.computed_tokens = len(assembled.computed)
        with self._turn(), trace.stage("prefill", backbone.synchronize):
            if trace.mode == "masked":
                return masked_prefill(backbone, self.prompt, assembled.cache)
            return prefill(backbone, self.prompt, assembled)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The model for this prompt alone; the time until then is `waiting_ms`."""
        with ExitStack() as turn:
            with self.trace.stage("waiting"):
                turn.enter_context(self.backbone.turns.alone())
            yield

    def _repaired(self, room: int) -> Tensor:
        """As `_start`, some tokens of the passages computed again; assembly is timed with it."""
        trace, prompt = self.trace, self.prompt
        snapshots = self._snapshots()
        with self._turn(), trace.stage("prefill", self.backbone.synchronize):
            runs = exact_runs(prompt, self._kept_runs(), self.reuse.repair)
            found = repaired(self.backbone, prompt, snapshots, runs, self.reuse.repair, room=room)
        self.cache = found.cache
        trace.computed_tokens, trace.repaired_tokens = found.computed_tokens, found.again
        trace.reused_tokens = prompt.reused_tokens - found.again
        trace.prefix_tokens = sum(map(len, runs.values()))
        return found.logits

    def step(self, token_id: int) -> Tensor:
        """Append a generated token: logits [vocab] of the next."""
        if self.cache is None:
            raise RuntimeError("step before start")
        position = len(self.prompt) + len(self._said)
        try:
            logits = decode_one_token(self.backbone, token_id, position, self.cache)
        except torch.cuda.OutOfMemoryError as error:
            raise _out_of_memory(position, error) from error
        self._said.append(token_id)
        return logits

    def assemble(self, room: int, *, wait: bool = True) -> Assembled:
        """Read and assemble; with `wait` until all is in place, else `cache.ready` says when."""
        backbone, trace = self.backbone, self.trace
        snapshots = self._snapshots()
        with trace.stage("assembly", backbone.synchronize if wait else None):
            runs = self._kept_runs()
            assembled = assemble(backbone, self.prompt, snapshots, runs, room=room)
        trace.reused_tokens = self.prompt.reused_tokens
        trace.prefix_tokens = sum(map(len, runs.values()))
        return assembled

    def _snapshots(self) -> Sequence[Source]:
        """One for each passage of the prompt."""
        passages = [self.prompt.passage_ids(span) for span in self.prompt.passages]
        return self.reuse.snapshots.fetch(passages, self.trace) if passages else []

    def _kept_runs(self) -> dict[int, Run]:
        """Runs that earlier prompts began alike, by span number; the last token is computed."""
        if self.reuse.prefix is None:
            return {}
        scope = f"{self.reuse.scope}{self.reuse.repair.name if self.reuse.repair else ''}"
        fingerprint = PassageEncoder(self.backbone, self.prompt.header).fingerprint
        root = chain_root(fingerprint + self.backbone.links, self.backbone.dtype, scope)
        self._chain = chain_keys(self.prompt, root)
        ids = self.prompt.token_ids[:-1].numpy()
        found = {}
        for i, span in enumerate(self.prompt.spans):
            wanted = ids[span.start : span.stop]
            computed = span.document is None and len(wanted) > 0
            if computed and (run := self.reuse.prefix.get(self._chain[i], wanted)):
                found[i] = run
        return found

    def keep(self) -> None:
        """Keep the runs computed for this prompt, and the answer's, for prompts that share them.

        The answer's is reused as far as a later turn holds the tokens that were generated; the last
        of them is never in the cache. Not where it was made with other weights than a prompt is.
        """
        prefix, cache, repair = self.reuse.prefix, self.cache, self.reuse.repair
        if prefix is None or cache is None or not self._chain:
            return
        ids = np.concatenate([self.prompt.token_ids.numpy(), np.array(self._said, np.int64)])
        places = cache.positions.argsort()
        answer = Span(len(self.prompt), len(ids))
        spans = self.prompt.spans if self.backbone.quick else (*self.prompt.spans, answer)
        for i, (chain, span) in enumerate(zip(self._chain, spans, strict=False)):
            run = ids[span.start : span.stop]
            wanted = span.document is None and len(run) and lasting(self.prompt, i, repair)
            if wanted and run_key(chain, run) not in prefix:
                prefix.put(chain, run, Run(*cache.entries(places[span.start : span.stop])))

    def end(self) -> None:
        """Keep what later prompts may share, and give the live cache's memory back."""
        self.keep()
        if self.cache is not None:
            self.backbone.turns.end(self.cache)
            self.backbone.give_back(self.cache)
            self.cache = None

    def _nothing_reused(self, room: int) -> Assembled:
        """An empty cache, and all tokens to compute; "full" drops the segments."""
        if self.trace.mode == "full":
            self.prompt = replace(self.prompt, segments=torch.zeros_like(self.prompt.segments))
        none = torch.empty(0, dtype=torch.int64)
        cache = self.backbone.new_cache(none, none, len(self.prompt) + room)
        return Assembled(cache, torch.arange(len(self.prompt)))


def _out_of_memory(tokens: int, error: Exception) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the device ran out of memory for a prompt of {tokens} tokens ({error}); use fewer or "
        "shorter passages, a smaller dtype or another device"
    )
