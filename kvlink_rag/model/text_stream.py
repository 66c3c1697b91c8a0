"""From the parts of a prompt to the last piece of text, as it comes.

    parts → layout → snapshots → live cache → prefill → first token → decode → text

Knows the steps (`prompt_run` does the first five); knows no collection and no template.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kvlink_rag.arguments import Mode, Repair
from kvlink_rag.documents import Part
from kvlink_rag.engine.backbone import Backbone
from kvlink_rag.engine.sampling import Sampling, sample
from kvlink_rag.engine.text_pieces import TextPieces
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.trace import Trace

from .prompt_run import PromptRun


class TextStream(Iterator[str]):
    """An answer as it comes. `trace` fills as it runs; `text` is what has been yielded so far.

    end_ids: token ids that end an answer; never: those that are never said. notice: of the model,
    for the trace. parts: read when the first piece is asked for.
    """

    def __init__(
        self,
        format: PromptFormat,
        backbone: Backbone,
        parts: Iterable[Part],
        *,
        end_ids: Collection[int],
        sampling: Sampling,
        mode: Mode,
        reuse: Reuse,
        trace: Trace | None = None,
        never: Sequence[int] = (),
        notice: str = "",
    ) -> None:
        self.trace = trace or Trace()
        self.trace.mode, self.trace.notice = mode, notice
        self.text = ""
        self._fresh = trace is None
        self._parts = list(parts) if isinstance(parts, Sequence) else parts
        self._format, self._backbone, self._end_ids = format, backbone, list(end_ids)
        self._sampling, self._reuse, self._never = sampling, reuse, list(never)
        self._pieces = self._run()

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    @property
    def repair(self) -> Repair:
        """What is computed again of reused passages."""
        return self._reuse.repair

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        trace, sampling = self.trace, self._sampling
        if self._fresh:
            trace.restart()
        # 1. parts → layout
        parts = list(self._parts)
        with trace.stage("layout"):
            prompt = self._format.layout(parts)
        room = min(sampling.max_new_tokens, self._format.window - len(prompt))
        # 2. layout → snapshots → live cache → prefill
        run = PromptRun(self._backbone, prompt, trace, self._reuse)
        logits = run.start(room)
        # 3. first token → decode → text
        try:
            yield from self._decode(run, logits, room)
        finally:
            run.end()
            trace.total_ms = trace.elapsed_ms()

    def _decode(self, run: PromptRun, logits: Tensor, room: int) -> Generator[str, None, None]:
        """Pieces of text, of at most `room` tokens; the first one from `logits` [vocab]."""
        trace, sampling = self.trace, self._sampling
        pieces = TextPieces(self._format.tokenizer.decode, sampling.stop)
        generator = sampling.generator()
        stop_ids, seen = self._stop_ids(), run.prompt.token_ids
        for count in range(1, room + 1):
            token = sample(self._allowed(logits, pieces), sampling, generator, seen)
            if count == 1:
                trace.first_token_ms = trace.elapsed_ms()
            if token in self._end_ids:
                trace.finish_reason = "stop"
                break
            trace.generated_tokens = count
            if token not in stop_ids and (piece := pieces.push(token)):
                yield piece
            if pieces.stopped or token in stop_ids:
                trace.finish_reason = "stop"
                break
            if count < room:
                if sampling.repetition_penalty != 1:
                    seen = torch.cat([seen, torch.tensor([token])])
                logits = run.step(token)
        else:
            trace.finish_reason = "length"
        if piece := pieces.finish():
            yield piece

    def _stop_ids(self) -> list[int]:
        """Ids of stop strings that are a special token, which is no text that could be seen."""
        known = self._format.tokenizer.special_ids
        return [known[text] for s in self._sampling.stop if (text := s.strip()) in known]

    def _allowed(self, logits: Tensor, pieces: TextPieces) -> Tensor:
        """`logits` without what is never said, nor an end as long as nothing visible was."""
        early = [] if pieces.visible or pieces.stopped else self._end_ids
        if not early and not self._never:
            return logits
        logits = logits.clone()
        logits[[*early, *self._never]] = -torch.inf
        return logits
