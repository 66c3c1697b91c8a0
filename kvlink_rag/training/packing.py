"""Packed training prompts, many questions over one set of passages, one visibility rule.

One prompt carries many questions. What comes up to the last passage is group 0; each question
with its answer is a group of its own, sees group 0 and itself, and starts at the same position.
Everything else about the layout (link tokens, slots, markers, who sees whom) comes from
`kvlink_rag.layout`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvlink_rag.documents import Text
from kvlink_rag.prompt.layout import Layout, PartEncoder, layout, visibility
from kvlink_rag.prompt.spec import Spec

from .formats import END, Prompt

WINDOW = 8192
Learn = Literal["answers", "questions", "all"]


class CachedEncoder:
    """Remembers the ids of parts: one prompt's passages are laid out once for each of its
    questions.
    """

    def __init__(self, encoder: PartEncoder) -> None:
        self._encoder = encoder
        self._seen: dict[tuple[str, bool], list[int]] = {}

    def encode(self, text: str, special: bool = False) -> list[int]:
        key = (text, special)
        if key not in self._seen:
            if len(self._seen) > 20_000:
                self._seen.clear()
            self._seen[key] = self._encoder.encode(text, special)
        return self._seen[key]


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed prompt, all int64 [tokens]; `targets` holds the next token where it is an
    answer's, else -100.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Tensor
    groups: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [queries, keys]: the engine's rule inside group 0 and one's own group.

        Takes indices of tokens, in any order; -1 is padding, which sees and is seen by padding
        only.
        """
        at, segment, group = self.positions, self.segments, self.groups
        seen = visibility(at[queries], segment[queries], at[keys], segment[keys])
        near = (group[queries][:, None] == group[keys][None, :]) | (group[keys][None, :] == 0)
        real = (queries >= 0)[:, None] & (keys >= 0)[None, :]
        return (seen & near & real) | ((queries < 0)[:, None] & (keys < 0)[None, :])


def pack(
    prompt: Prompt,
    asked: Sequence[tuple[str, str]],
    encoder: PartEncoder,
    spec: Spec,
    *,
    first_slot: int = 0,
    reuse: bool = True,
    learn: Learn = "answers",
    gaps: random.Random | None = None,
) -> Packed:
    """Lay the prompt out with each (question, answer) and join the tails behind the common prefix.

    reuse: False for ordinary causal attention over the same tokens.
    learn: whose tokens are targets; "questions" and "all" include the answers.
    gaps: source of random distances put before passages and questions, up to the window.
    """
    whole = [
        layout(
            (*prompt.ask(q), Text(a), Text(END, special=True)), encoder, spec, first_slot=first_slot
        )
        for q, a in asked
    ]
    shared = len(whole[0]) - tail_length(prompt, *asked[0], encoder)
    learned = [len(encoder.encode(a)) + 1 for _, a in asked]
    if learn != "answers":
        learned = [len(each) - shared - 1 for each in whole]
    offsets = _offsets(whole[0], shared, gaps)
    tails = [slice(shared, len(each)) for each in whole]
    pieces = [(whole[0], slice(0, shared)), *zip(whole, tails, strict=True)]
    return Packed(
        token_ids=torch.cat([each.token_ids[cut] for each, cut in pieces]),
        positions=torch.cat([each.positions[cut] for each, cut in pieces])
        + torch.cat([offsets, offsets[-1].expand(sum(len(each) - shared for each in whole))]),
        segments=torch.cat([each.segments[cut] * reuse for each, cut in pieces]),
        groups=torch.cat(
            [torch.full((cut.stop - cut.start,), i) for i, (_, cut) in enumerate(pieces)]
        ),
        targets=torch.cat(
            [_passage_targets(whole[0], shared, learn), *map(_targets, whole, tails, learned)]
        ),
    )


def tail_length(prompt: Prompt, question: str, answer: str, encoder: PartEncoder) -> int:
    """Tokens of one question's group: the wrapped question, what follows it, the answer and its
    end.
    """
    asked = encoder.encode(prompt.tail.format(question)) + encoder.encode(prompt.after, True)
    return len(asked) + len(encoder.encode(answer)) + 1


def _passage_targets(whole: Layout, shared: int, learn: Learn) -> Tensor:
    """For the first `shared` tokens: the next token where it is of the same passage, if learned."""
    targets = torch.full((shared,), -100)
    segments = whole.segments[:shared]
    same = (segments[:-1] == segments[1:]) & (segments[:-1] > 0)
    if learn == "all":
        targets[:-1] = torch.where(same, whole.token_ids[1:shared], -100)
    return targets


def _targets(whole: Layout, tail: slice, learned: int) -> Tensor:
    """Each of the last `learned` tokens is the target of the token before it."""
    targets = torch.full((tail.stop - tail.start,), -100)
    targets[-learned - 1 : -1] = whole.token_ids[-learned:]
    return targets


def _offsets(whole: Layout, shared: int, gaps: random.Random | None) -> Tensor:
    """What is added to each of the first `shared` positions: distances that grow at span
    borders.
    """
    steps = torch.zeros(shared, dtype=torch.int64)
    room = WINDOW - len(whole)
    if gaps is not None and room > 0:
        starts = [span.start for span in whole.spans if 0 < span.start < shared]
        share = gaps.random() * room / max(1, len(starts))
        for start in starts:
            steps[start] = gaps.randint(0, int(share))
    return steps.cumsum(0)
