"""A training sample: parts of a prompt as inference lays them out, and which text is learned.

Knows parts, token ids and the layout; knows no data set and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlink_rag.documents import Part, Text
from kvlink_rag.errors import PromptTooLong
from kvlink_rag.prompt.layout import PartEncoder, layout
from kvlink_rag.prompt.spec import Spec

IGNORED = -100  # transformers' label of what is not learned


@dataclass(frozen=True, slots=True)
class Sample:
    """head: all parts up to the last passage, or further. tail: text after it, learned or not.

    cut: the end may be left out where the sample is too long (plain text).
    """

    head: tuple[Part, ...]
    tail: tuple[tuple[Text, bool], ...]
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample laid out: int64 [tokens] each; labels hold the token itself where it is learned."""

    token_ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return int((self.labels != IGNORED).sum())


def encode(sample: Sample, encoder: PartEncoder, spec: Spec, longest: int) -> Encoded:
    """Lay `sample` out as inference does.

    Raises `PromptTooLong` beyond `longest` tokens, `TooManyPassages` beyond the spec's slots.
    """
    laid_out = layout((*sample.head, *(text for text, _ in sample.tail)), encoder, spec)
    if len(laid_out) > longest and not sample.cut:
        raise PromptTooLong(
            f"the sample has {len(laid_out)} tokens, expected at most {longest}; raise max_length, "
            "or leave on_bad at skip"
        )
    labels = torch.full_like(laid_out.token_ids, IGNORED)
    stop = len(labels)
    for text, learned in reversed(sample.tail):
        start = stop - len(encoder.encode(text.text, text.special))
        if learned:
            labels[start:stop] = laid_out.token_ids[start:stop]
        stop = start
    labels[0] = IGNORED  # nothing predicts it
    fields = (laid_out.token_ids, laid_out.positions, laid_out.segments, labels)
    return Encoded(*(field[:longest] for field in fields))
