"""How far a way to the first token is from full attention, on the answers of full attention itself.

Needs no right answers: full attention says what it says (greedy), and every other way is asked how
it would have said it. Knows one model's prompts; knows no collection and no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.prompt.layout import Layout
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.trace import Trace

FULL = "full"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the first token, over all questions.

    name: a repair, or "full". divergence: Kullback-Leibler from full attention, mean nats a token
    of its answers. agreement: the share of those tokens that are this way's best. first: the same,
    of first tokens only. first_token_ms: median, snapshots and index warm, without retrieval.
    """

    name: str
    divergence: float
    agreement: float
    first: float
    first_token_ms: float

    @classmethod
    def of(cls, name: str, seen: Sequence[Seen]) -> Way:
        """The means over `seen`."""
        return cls(
            name,
            fmean(each for one in seen for each in one.divergence),
            fmean(each for one in seen for each in one.same),
            fmean(one.same[0] for one in seen),
            median(one.first_token_ms for one in seen),
        )


@dataclass(frozen=True, slots=True)
class Taught:
    """A greedy answer of full attention.

    said: its token ids. logits: float32 [tokens, vocab] behind each. first_token_ms: to the first.
    """

    said: list[int]
    logits: Tensor
    first_token_ms: float

    def seen(self) -> Seen:
        """Full attention beside itself."""
        return Seen([True] * len(self.said), [0.0] * len(self.said), self.first_token_ms)


@dataclass(frozen=True, slots=True)
class Seen:
    """One way on one question: agreement of each token, divergence of each, and milliseconds."""

    same: list[bool]
    divergence: list[float]
    first_token_ms: float


def teach(model: KVLinkModel, plain: Layout, reuse: Reuse, tokens: int) -> Taught:
    """The greedy answer of full attention to a prompt without link tokens, up to `tokens` long."""
    room = min(tokens, model.window - len(plain))
    run = PromptRun(model.backbone, plain, Trace(mode=FULL), reuse)
    logits, rows, said = run.start(room=room), [], []
    spent = run.trace.elapsed_ms()
    for _ in range(room):
        rows.append(logits.float().cpu())
        said.append(int(_sayable(model, rows[-1]).argmax()))
        if said[-1] in model.end_ids or len(said) == room:
            break
        logits = run.step(said[-1])
    run.end()
    return Taught(said, torch.stack(rows), spent)


def beside(model: KVLinkModel, prompt: Layout, reuse: Reuse, taught: Taught) -> Seen:
    """How reuse, under the repair of `reuse`, would have said what full attention said."""
    run = PromptRun(model.backbone, prompt, Trace(mode="reuse"), reuse)
    logits = run.start(room=len(taught.said))
    spent = run.trace.elapsed_ms()
    rows = [logits.float().cpu()]
    for token in taught.said[:-1]:
        rows.append(run.step(token).float().cpu())
    run.end()
    both = (torch.stack(rows)[:, : taught.logits.shape[1]], taught.logits)  # tokens of both
    found, wanted = (_sayable(model, each).log_softmax(-1) for each in both)
    terms = (wanted.exp() * (wanted - found)).nan_to_num(0.0)  # what is never said counts nothing
    same = found.argmax(-1) == wanted.argmax(-1)
    return Seen(same.tolist(), terms.sum(-1).tolist(), spent)


def _sayable(model: KVLinkModel, logits: Tensor) -> Tensor:
    """`logits` [..., vocab] without what is never said."""
    never = [id for id in model.never_ids if id < logits.shape[-1]]
    return logits.index_fill(-1, torch.tensor(never, dtype=torch.int64), -torch.inf)
