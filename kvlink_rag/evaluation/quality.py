"""What reuse costs on a collection's own questions: each way beside full attention.

For each question the passages that the collection retrieves, the answer that the model gives with
full attention (greedy), and how each way to the first token would have said it: the divergence of
its distributions, how often its best token is the same, and the time to its first token. Needs no
right answers. Knows a collection and its model; knows no files and no terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from torch import Tensor

from kvlink_rag.arguments import NO_REPAIR, parse_repair
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.compare.baselines import plain_spec
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.prompt.layout import Layout, layout
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.trace import Trace

WAYS = (NO_REPAIR, "first:16", "select:15%")
FULL = "full"
TOKENS = 16  # of each answer of full attention
CLOSE = 0.95  # of its tokens that a way must agree with to be recommended


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


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured, full attention first; recommended: the name of a way, and why."""

    questions: int
    ways: tuple[Way, ...]
    recommended: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """One way on one question: agreement of each token, divergence of each, and milliseconds."""

    same: list[bool]
    divergence: list[float]
    first_token_ms: float


def measure(
    rag: KVLinkRAG,
    questions: Sequence[str],
    *,
    k: int = 10,
    ways: Sequence[str] = WAYS,
    tokens: int = TOKENS,
) -> Quality:
    """Measure `ways` over the best `k` passages of each question.

    Costs a full prefill a question. Raises `ConfigError` where there is no question, no document or
    no such way.
    """
    repairs = [parse_repair(name) for name in ways]
    if not questions:
        raise ConfigError("found no questions, expected at least one; give one a line")
    if not len(rag):
        raise ConfigError(f"{rag.directory} holds no documents; add some (kvlink-rag: index PATH)")
    loaded = rag.parts.loaded()
    model, reuse = loaded.model, replace(loaded.reuse, prefix=None)
    seen: dict[str, list[_Seen]] = {FULL: [], **{repair.name: [] for repair in repairs}}
    for question in questions:
        parts = model.prompt([hit.document for hit in rag.search(question, k)], question)
        plain, laid = layout(parts, model.tokenizer, plain_spec(model.spec)), model.layout(parts)
        warm = PromptRun(model.backbone, laid, Trace(mode="reuse"), reuse)
        warm.start(room=0)
        warm.end()
        room = min(tokens, model.window - len(laid))
        said, expected, spent = _teach(model, plain, reuse, room)
        seen[FULL].append(_Seen([True] * len(said), [0.0] * len(said), spent))
        for repair in repairs:
            mended = replace(reuse, repair=repair)
            run = PromptRun(model.backbone, laid, Trace(mode="reuse"), mended)
            logits, spent = _over(model, run, said)
            seen[repair.name].append(_compared(model, logits, expected, spent))
    found = tuple(_way(name, each) for name, each in seen.items())
    return Quality(len(questions), found, *_recommended(found))


def _teach(
    model: KVLinkModel, plain: Layout, reuse: Reuse, room: int
) -> tuple[list[int], Tensor, float]:
    """The greedy answer of full attention, up to `room` tokens.

    With the logits [tokens, vocab] behind it, and the milliseconds to the first of them.
    """
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
    return said, torch.stack(rows), spent


def _over(model: KVLinkModel, run: PromptRun, said: Sequence[int]) -> tuple[Tensor, float]:
    """The logits [tokens, vocab] that a way has at each token of `said`, and milliseconds."""
    logits = run.start(room=len(said))
    spent = run.trace.elapsed_ms()
    rows = [logits.float().cpu()]
    for token in said[:-1]:
        rows.append(run.step(token).float().cpu())
    run.end()
    return torch.stack(rows), spent


def _compared(model: KVLinkModel, logits: Tensor, expected: Tensor, spent: float) -> _Seen:
    found, wanted = (_sayable(model, each).log_softmax(-1) for each in (logits, expected))
    terms = (wanted.exp() * (wanted - found)).nan_to_num(0.0)  # what is never said counts nothing
    same = found.argmax(-1) == wanted.argmax(-1)
    return _Seen(same.tolist(), terms.sum(-1).tolist(), spent)


def _sayable(model: KVLinkModel, logits: Tensor) -> Tensor:
    """`logits` [..., vocab] without what is never said."""
    if not model.never_ids:
        return logits
    return logits.index_fill(-1, torch.tensor(model.never_ids), -torch.inf)


def _way(name: str, seen: Sequence[_Seen]) -> Way:
    return Way(
        name,
        fmean(each for one in seen for each in one.divergence),
        fmean(each for one in seen for each in one.same),
        fmean(one.same[0] for one in seen),
        median(one.first_token_ms for one in seen),
    )


def _recommended(ways: Sequence[Way]) -> tuple[str, str]:
    """The quickest way that says nearly what full attention says."""
    full, *others = ways
    close = [way for way in others if way.agreement >= CLOSE]
    if close:
        best = min(close, key=lambda way: way.first_token_ms)
        return best.name, (
            f"the quickest of those that agree with full attention on {CLOSE:.0%} of its tokens"
        )
    best = min(others, key=lambda way: way.divergence, default=full)
    return FULL, (
        f"no way agrees with full attention on {CLOSE:.0%} of its tokens; {best.name} is nearest"
    )


def read_questions(lines: Sequence[str]) -> Iterator[str]:
    """Questions, one a line; of lines of JSON their "question". Raises `ConfigError`."""
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text.startswith("{"):
            try:
                text = json.loads(text)["question"].strip()
            except (ValueError, LookupError, AttributeError) as error:
                raise ConfigError(
                    f"line {number} is no JSON object with a question ({error!r})"
                ) from error
        if text:
            yield text
