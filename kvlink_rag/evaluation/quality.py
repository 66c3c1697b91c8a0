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
from pathlib import Path

from kvlink_rag.arguments import NO_REPAIR, parse_repair
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.compare.baselines import plain_spec
from kvlink_rag.compare.divergence import FULL, Seen, Way, beside, teach
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.prompt_run import PromptRun
from kvlink_rag.prompt.layout import layout
from kvlink_rag.trace import Trace

WAYS = (NO_REPAIR, "first:16", "select:15%")
TOKENS = 16  # of each answer of full attention
CLOSE = 0.95  # of its tokens that a way must agree with to be recommended


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured, full attention first; recommended: the name of a way, and why."""

    questions: int
    ways: tuple[Way, ...]
    recommended: str
    reason: str


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
    seen: dict[str, list[Seen]] = {FULL: [], **{repair.name: [] for repair in repairs}}
    for question in questions:
        parts = model.prompt([hit.document for hit in rag.search(question, k)], question)
        plain, laid = layout(parts, model.tokenizer, plain_spec(model.spec)), model.layout(parts)
        warm = PromptRun(model.backbone, laid, Trace(mode="reuse"), reuse)
        warm.start(room=0)
        warm.end()
        taught = teach(model, plain, reuse, min(tokens, model.window - len(laid)))
        seen[FULL].append(taught.seen())
        for repair in repairs:
            seen[repair.name].append(beside(model, laid, replace(reuse, repair=repair), taught))
    found = tuple(Way.of(name, each) for name, each in seen.items())
    return Quality(len(questions), found, *_recommended(found))


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


def questions_in(path: str | Path) -> list[str]:
    """The questions in a file; see `read_questions`. Raises `ConfigError`."""
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the questions in {path} cannot be read: {error}") from error
    return list(read_questions(lines))


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
