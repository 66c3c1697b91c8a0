"""A training sample: parts of a prompt as inference lays them out, and which text is learned.

Several questions may follow one memory. Each is a branch, blind to the others, and begins at the
position where the memory ends, so that it is what it would be alone; passages are computed once.

Knows parts, token ids and the layout; knows no data set and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.documents import Part, Text
from kvlink_rag.errors import PromptTooLong
from kvlink_rag.prompt.layout import Layout, PartEncoder, layout
from kvlink_rag.prompt.spec import Spec

IGNORED = -100  # transformers' label of what is not learned


Tail = tuple[tuple[Text, bool], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """head: all parts up to the last passage, or further. tails: what may follow, learned or not.

    Of several tails each stands for a prompt of its own. cut: the end may be left out where the
    sample is too long (plain text, one tail).
    """

    head: tuple[Part, ...]
    tails: tuple[Tail, ...]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample laid out: int64 [tokens] each, the head (branch 0), then tail by tail (1, 2, …).

    targets: the next token of the same branch where that one is learned, else `IGNORED`.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Tensor
    branches: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return int((self.targets != IGNORED).sum())


def encode(sample: Sample, encoder: PartEncoder, spec: Spec, longest: int) -> Encoded:
    """Lay `sample` out as inference does.

    Raises `PromptTooLong` beyond `longest` tokens, `TooManyPassages` beyond the spec's slots.
    """
    tails = sample.tails or ((),)
    learned = [_learned(tail, encoder) for tail in tails]
    prompts = [layout((*sample.head, *(t for t, _ in tail)), encoder, spec) for tail in tails]
    whole = [prompt.with_headers() for prompt in prompts]
    shared = len(whole[0]) - len(learned[0])
    branches = [_branch(w, m, shared) for w, m in zip(whole, learned, strict=True)]
    pieces = [_head(whole[0], shared, learned), *branches]
    joined = (torch.cat(field) for field in zip(*pieces, strict=True))
    token_ids, positions, segments, targets = joined
    lengths = torch.tensor([shared, *map(len, learned)])
    branch = torch.arange(len(lengths)).repeat_interleave(lengths)
    if len(token_ids) > longest and not sample.cut:
        raise PromptTooLong(
            f"the sample has {len(token_ids)} tokens, expected at most {longest}; raise "
            "max_length, ask fewer questions at once, or leave on_bad at skip"
        )
    fields = (token_ids, positions, segments, branch, targets)
    return Encoded(*(field[:longest] for field in fields))


def _learned(tail: Tail, encoder: PartEncoder) -> Tensor:
    """bool [tokens of the tail]: which are learned."""
    pieces = [
        torch.full((len(encoder.encode(text.text, text.special)),), learned)
        for text, learned in tail
    ]
    return torch.cat([torch.zeros(0, dtype=torch.bool), *pieces])


_Fields = tuple[Tensor, Tensor, Tensor, Tensor]


def _head(whole: Layout, shared: int, learned: list[Tensor]) -> _Fields:
    """What all tails follow; its last token predicts the first of a single tail."""
    targets = torch.full((shared,), IGNORED)
    if shared and len(learned) == 1 and len(learned[0]) and learned[0][0]:
        targets[-1] = whole.token_ids[shared]
    cut = slice(shared)
    return whole.token_ids[cut], whole.positions[cut], whole.segments[cut], targets


def _branch(whole: Layout, learned: Tensor, shared: int) -> _Fields:
    """One tail, each token predicting the next of it."""
    ids = whole.token_ids[shared:]
    targets = torch.full_like(ids, IGNORED)
    targets[:-1] = torch.where(learned[1:], ids[1:], IGNORED)
    return ids, whole.positions[shared:], whole.segments[shared:], targets
