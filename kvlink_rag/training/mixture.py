"""What a training batch is drawn from: numbers of pages, prompt formats, masks, slots and
distances.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvlink_rag.prompt.layout import PartEncoder
from kvlink_rag.prompt.spec import Spec

from . import formats
from .blocks import BIN, Batch, arrange, bins_of
from .formats import Prompt
from .packing import Learn, Packed, pack, tail_length
from .questions import Exercise, exercise
from .world import SIZES

Asked = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a batch is drawn from: shares of formats and masks, and the largest number of pages."""

    most_pages: int = 20
    usual_pages: tuple[int, ...] = (8, 10, 10, 12)
    usual_share: float = 0.6
    varied_share: float = 0.15
    full_share: float = 0.15
    text_share: float = 0.12
    gap_share: float = 0.25
    bare_share: float = 0.04
    turns_share: float = 0.06
    rows: int = 8
    bins: int = 4
    learn: Learn = "answers"
    absent: float = 0.2
    plain: float = 0.0
    sizes: tuple[int, ...] = SIZES
    dependent: float = 0.25
    across: float = 0.2
    strange: float = 0.0


def draw(rng: random.Random, mixture: Mixture, encoder: PartEncoder, spec: Spec) -> Batch:
    """One batch: every prompt has the same number of pages and its own format; fewer pages, more
    prompts.
    """
    usual = rng.random() < mixture.usual_share
    k = rng.choice(mixture.usual_pages) if usual else rng.randint(1, mixture.most_pages)
    reuse = rng.random() >= mixture.full_share
    text = rng.random() < mixture.text_share
    rows = max(1, round(mixture.rows * 14 / (4 + k)))
    return arrange(
        [draw_prompt(rng, mixture, encoder, spec, k, reuse=reuse, text=text) for _ in range(rows)]
    )


def draw_prompt(
    rng: random.Random,
    mixture: Mixture,
    encoder: PartEncoder,
    spec: Spec,
    k: int,
    *,
    reuse: bool = True,
    text: bool = False,
) -> Packed:
    """One packed prompt of k pages: format, first slot and distances are drawn on their own.

    reuse: False for ordinary causal attention; text: the pages are plain text instead of passages.
    """
    task = exercise(
        rng,
        k,
        questions=2 * BIN * mixture.bins // 24,
        absent=mixture.absent,
        plain=mixture.plain,
        sizes=mixture.sizes,
        dependent=mixture.dependent,
        across=mixture.across,
        strange=mixture.strange,
    )
    if text:
        prompt, asked = formats.varied(task.pages, rng, reuse=False, spec=spec), _asked(task)
    else:
        prompt, asked = _format(rng, mixture, task, spec)
    free = (spec.max_passages or k) - k
    slot = rng.randint(0, free) if rng.random() < 0.5 else 0
    gaps = rng if rng.random() < mixture.gap_share else None
    fitting = _fitting(prompt, asked, encoder, mixture.bins)
    return pack(
        prompt,
        fitting,
        encoder,
        spec,
        first_slot=slot,
        reuse=reuse,
        learn=mixture.learn,
        gaps=gaps,
    )


def _fitting(prompt: Prompt, asked: Asked, encoder: PartEncoder, bins: int) -> Asked:
    """As many of the questions as fill `bins` bins."""
    lengths = [tail_length(prompt, *each, encoder) for each in asked]
    kept = [i for members in bins_of(lengths, BIN)[:bins] for i in members]
    return [asked[i] for i in sorted(kept)]


def _asked(task: Exercise) -> Asked:
    return [(q.text, q.answer) for q in task.questions]


def _format(
    rng: random.Random, mixture: Mixture, task: Exercise, spec: Spec
) -> tuple[Prompt, Asked]:
    """The prompt of a task and what is asked: without documents the answers change."""
    asked = _asked(task)
    shares = (mixture.bare_share, mixture.turns_share, mixture.varied_share)
    kinds = ("bare", "turns", "varied", "preset")
    kind = rng.choices(kinds, (*shares, 1 - sum(shares)))[0]
    if kind == "bare":
        return formats.bare(rng, spec), [formats.without_documents(q, rng) for q, _ in asked[:6]]
    if kind == "turns" and (cut := _turn(task)):
        said = formats.small_talk(rng) if rng.random() < 0.4 else asked[0]
        first = formats.preset(task.pages[:cut], spec)
        return formats.second_turn(first, *said, task.pages[cut:]), asked[1:] or asked
    if kind == "varied":
        return formats.varied(task.pages, rng, reuse=True, spec=spec), asked
    return formats.preset(task.pages, spec), asked


def _turn(task: Exercise) -> int:
    """Where the pages can be cut into two messages: near the middle, not before a continuation
    (0: nowhere).
    """
    cuts = range(len(task.pages) // 2, len(task.pages))
    return next((i for i in cuts if i > 0 and not task.pages[i].after), 0)
