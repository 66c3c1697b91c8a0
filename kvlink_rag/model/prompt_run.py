"""The life of a question, from the prompt's parts to the last piece of text.

    parts → layout → snapshots → live cache (assembly) → prefill → first token → decode → text

`TextStream` is the whole way; `Run` is one prompt inside the model. Knows the engine; snapshots
come from a `SnapshotSource`, which alone knows whether there is a store.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from kvlink_rag.arguments import check_codec
from kvlink_rag.documents import Part
from kvlink_rag.engine.backbone import Backbone, LiveCache
from kvlink_rag.engine.device import DeviceMemory
from kvlink_rag.errors import DeviceMemoryError
from kvlink_rag.prompt.layout import Layout, Span
from kvlink_rag.snapshots.assemble import Assembled, assemble
from kvlink_rag.snapshots.encode import encode_many
from kvlink_rag.snapshots.kept_runs import PrefixCache, Run, chain_keys, run_key
from kvlink_rag.snapshots.snapshot import EXACT, AnySnapshot, Source, in_codec
from kvlink_rag.trace import Trace

from .generation import Sampling, TextPieces, decode_one_token, prefill, sample

if TYPE_CHECKING:
    from .model import KVLinkModel

Mode = Literal["reuse", "masked", "full"]

logger = logging.getLogger(__name__)


class SnapshotSource(Protocol):
    """Where the snapshots of a prompt's passages come from."""

    def fetch(self, passages: Sequence[tuple[int, ...]], trace: Trace) -> Sequence[Source]:
        """One snapshot a passage (token ids), in order; times and counts go into `trace`."""
        ...


class EncodeNow:
    """The source that keeps nothing: every passage is encoded when asked for, once a prompt.

    codec: what the snapshots go through, as those of a collection with this codec would.
    """

    def __init__(self, backbone: Backbone, codec: str = EXACT) -> None:
        self.backbone, self.codec = backbone, check_codec(codec)

    def fetch(self, passages: Sequence[tuple[int, ...]], trace: Trace) -> list[AnySnapshot]:
        """See `SnapshotSource`."""
        unique = list(dict.fromkeys(passages))
        with trace.stage("encode", self.backbone.synchronize):
            encoded = encode_many(self.backbone, unique)
            made = {unique[i]: in_codec(snapshot, self.codec) for i, snapshot in encoded}
        trace.snapshots_encoded += len(unique)
        return [made[ids] for ids in passages]


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a collection brings to a model: its snapshots and its kept runs (None: keep none).

    scope: of the kept runs; another one for each codec, since runs come from what they follow.
    memory: where on the device its snapshots are kept, or None.
    """

    snapshots: SnapshotSource
    prefix: PrefixCache | None = None
    scope: str = ""
    memory: DeviceMemory | None = None


class TextStream(Iterator[str]):
    """An answer as it comes. `trace` fills as it runs; `text` is what has been yielded so far."""

    def __init__(
        self,
        model: KVLinkModel,
        parts: Iterable[Part],
        sampling: Sampling,
        mode: Mode,
        reuse: Reuse,
        trace: Trace | None = None,
    ) -> None:
        self.trace = trace or Trace()
        self.trace.mode, self.trace.notice = mode, model.notice
        self.text = ""
        self._fresh = trace is None
        self._parts = list(parts) if isinstance(parts, Sequence) else parts
        self._model, self._sampling, self._reuse = model, sampling, reuse
        self._pieces = self._run()

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        trace, sampling, model = self.trace, self._sampling, self._model
        if self._fresh:
            trace.restart()
        parts = list(self._parts)
        with trace.stage("layout"):
            prompt = model.layout(parts)
        room = min(sampling.max_new_tokens, model.window - len(prompt))
        run = PromptRun(model.backbone, prompt, trace, self._reuse)
        pieces = TextPieces(model.tokenizer.decode, sampling.stop)
        generator = sampling.generator()
        logits = run.start(room)
        try:
            for count in range(1, room + 1):
                token = sample(self._allowed(logits, pieces), sampling, generator)
                if count == 1:
                    trace.first_token_ms = trace.elapsed_ms()
                if token in model.end_ids:
                    trace.finish_reason = "stop"
                    break
                trace.generated_tokens = count
                if piece := pieces.push(token):
                    yield piece
                if pieces.stopped:
                    trace.finish_reason = "stop"
                    break
                if count < room:
                    logits = run.step(token)
            else:
                trace.finish_reason = "length"
            if piece := pieces.finish():
                yield piece
        finally:
            run.end()
            trace.total_ms = trace.elapsed_ms()

    def _allowed(self, logits: Tensor, pieces: TextPieces) -> Tensor:
        """`logits` without added tokens, and without an end until something visible was said."""
        ruled_out = list(self._model.added_ids)
        if not (pieces.visible or pieces.stopped):
            ruled_out += self._model.end_ids
        if not ruled_out:
            return logits
        logits = logits.clone()
        logits[ruled_out] = -torch.inf
        return logits


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
        trace.passages = len(self.prompt.passages)
        if trace.mode == "reuse":  # a workspace's forward begins while snapshots still arrive
            assembled = self.assemble(room, wait=backbone.workspaces is None)
        else:
            assembled = self._nothing_reused(room)
        self.cache = assembled.cache
        trace.computed_tokens = len(assembled.computed)
        with trace.stage("prefill", backbone.synchronize):
            return prefill(backbone, self.prompt, assembled)

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
        passages = [self.prompt.passage_ids(span) for span in self.prompt.passages]
        snapshots = self.reuse.snapshots.fetch(passages, trace) if passages else []
        with trace.stage("assembly", backbone.synchronize if wait else None):
            runs = self._kept_runs()
            assembled = assemble(backbone, self.prompt, snapshots, runs, room=room)
        trace.reused_tokens = self.prompt.reused_tokens
        trace.prefix_tokens = sum(map(len, runs.values()))
        return assembled

    def _kept_runs(self) -> dict[int, Run]:
        """Runs that earlier prompts began alike, by span number; the last token is computed."""
        if self.reuse.prefix is None:
            return {}
        self._chain = chain_keys(self.prompt, _chain_root(self.backbone, self.reuse.scope))
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
        of them is never in the cache.
        """
        prefix, cache = self.reuse.prefix, self.cache
        if prefix is None or cache is None or not self._chain:
            return
        ids = np.concatenate([self.prompt.token_ids.numpy(), np.array(self._said, np.int64)])
        places = cache.positions.argsort()
        answer = Span(len(self.prompt), len(ids))
        for chain, span in zip(self._chain, (*self.prompt.spans, answer), strict=True):
            run = ids[span.start : span.stop]
            if span.document is None and len(run) and run_key(chain, run) not in prefix:
                prefix.put(chain, run, Run(*cache.entries(places[span.start : span.stop])))

    def end(self) -> None:
        """Keep what later prompts may share, and give the live cache's memory back."""
        self.keep()
        if self.cache is not None:
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


def _chain_root(backbone: Backbone, scope: str) -> str:
    """What every chain of kept runs begins with: the model, its dtype and the scope."""
    text = f"{backbone.fingerprint}\0{backbone.dtype}\0{scope}"
    return hashlib.sha256(text.encode()).hexdigest()
