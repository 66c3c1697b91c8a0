"""The one function that turns a prompt's parts into token ids, positions and visibility.

Training, encoding, assembly, the oracle and the adapters all lay prompts out here, so they
cannot drift apart. The rule (KVLink, arXiv 2502.16002, section 3): a passage's tokens see only
earlier tokens of the same passage and its header; every other token (segment 0) sees everything at
an earlier position but headers. A header is the same for all passages, so it is no part of a prompt
but of how passages are encoded; `Layout.with_headers` shows it where every token is computed.
Knows token ids and positions; knows no model, no cache and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvlink_rag.documents import Document, Part, Passage, Text
from kvlink_rag.errors import PromptError, TooManyPassages

from .spec import Spec


class PartEncoder(Protocol):
    """What `layout` asks of a tokenizer."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text` alone; special-token strings are tokens only if `special`."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch `[start, stop)` of the prompt: one passage, or one run of computed tokens."""

    start: int
    stop: int
    document: Document | None = None
    slot: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt laid out, in prompt order.

    token_ids, positions, segments: int64 [tokens]. Segment 0 is computed, segment n > 0 the n-th
    passage. spans cover all tokens, in order. header: token ids that each passage sees before it.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Tensor
    spans: tuple[Span, ...]
    header: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def passages(self) -> list[Span]:
        """The spans that are passages."""
        return [span for span in self.spans if span.document is not None]

    @property
    def reused_tokens(self) -> int:
        """How many tokens stand in passages."""
        return sum(len(span) for span in self.passages)

    def passage_ids(self, span: Span) -> tuple[int, ...]:
        """The token ids of one span."""
        return tuple(self.token_ids[span.start : span.stop].tolist())

    def with_headers(self) -> Layout:
        """The prompt with a header before each passage: what a prefill of all tokens computes.

        Its tokens take the positions that end where the passage begins (the first ones may be
        below 0) and the passage's segment, negated. Nothing else moves.
        """
        if not self.header:
            return self
        ids: list[Tensor] = []
        at: list[Tensor] = []
        segments: list[Tensor] = []
        spans: list[Span] = []
        size = len(self.header)
        shift = 0
        for span in self.spans:
            if span.document is not None:
                ids.append(torch.tensor(self.header))
                at.append(self.positions[span.start] + torch.arange(-size, 0))
                segments.append(-self.segments[span.start].repeat(size))
                spans.append(Span(span.start + shift, span.start + shift + size))
                shift += size
            ids.append(self.token_ids[span.start : span.stop])
            at.append(self.positions[span.start : span.stop])
            segments.append(self.segments[span.start : span.stop])
            spans.append(replace(span, start=span.start + shift, stop=span.stop + shift))
        return Layout(torch.cat(ids), torch.cat(at), torch.cat(segments), tuple(spans))


def layout(
    parts: Iterable[Part], encoder: PartEncoder, spec: Spec, *, first_slot: int = 0
) -> Layout:
    """Lay `parts` out: link tokens after each passage, one memory region per message.

    A special `Text` ends a message; slots count on through all messages, from `first_slot`.
    Raises `TooManyPassages` beyond the spec's slots, `PromptError` for an empty prompt.
    """
    pieces = _pieces(list(parts), encoder, spec, first_slot)
    ids: list[int] = []
    segments: list[int] = []
    spans: list[Span] = []
    for piece in pieces:
        if not piece.ids:
            continue
        start = len(ids)
        ids += piece.ids
        passages = sum(span.document is not None for span in spans)
        segments += [passages + 1 if piece.document is not None else 0] * len(piece.ids)
        spans.append(Span(start, len(ids), piece.document, piece.slot))
    if not ids or segments[-1] != 0:
        raise PromptError(
            "the prompt ends without computed text, so there is nothing to predict from; "
            "end it with a Text part such as the question"
        )
    return Layout(
        token_ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.arange(len(ids), dtype=torch.int64),
        segments=torch.tensor(segments, dtype=torch.int64),
        spans=tuple(spans),
        header=tuple(spec.header),
    )


def visibility(
    query_positions: Tensor,
    query_segments: Tensor,
    key_positions: Tensor,
    key_segments: Tensor,
    *,
    window: int | None = None,
    branches: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Which keys each query sees: bool [queries, keys].

    All arguments are int64 [queries] or [keys], in any order of tokens: only positions, segments
    and branches (of the queries and of the keys) decide. `window` is the sliding window in
    positions (a query sees itself and the `window - 1` positions before it), or None.
    """
    return sees(
        query_positions[:, None],
        query_segments[:, None],
        key_positions[None, :],
        key_segments[None, :],
        window=window,
        branches=branches and (branches[0][:, None], branches[1][None, :]),
    )


def sees(
    query_position: Tensor,
    query_segment: Tensor,
    key_position: Tensor,
    key_segment: Tensor,
    *,
    window: int | None = None,
    branches: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The rule itself, element by element: bool of the arguments' common shape.

    A negative segment -n is the header of passage n, which that passage alone sees.
    branches: of query and key. Several questions may stand over one memory, each a branch of its
    own from 1, blind to the others; branch 0 (memory, system prompt) is seen by all.
    """
    distance = query_position - key_position
    same = query_segment.abs() == key_segment.abs()
    seen = (distance >= 0) & (same | ((query_segment == 0) & (key_segment >= 0)))
    if branches is not None:
        query_branch, key_branch = branches
        seen = seen & ((key_branch == 0) | (query_branch == key_branch))
    return seen if window is None else seen & (distance < window)


@dataclass(frozen=True, slots=True)
class _Piece:
    ids: list[int]
    document: Document | None = None
    slot: int | None = None


def _pieces(
    parts: Sequence[Part], encoder: PartEncoder, spec: Spec, first_slot: int
) -> Iterator[_Piece]:
    """Token ids in prompt order: one piece for each part, each slot's links and each marker."""
    _check_slots(first_slot + sum(isinstance(part, Passage) for part in parts), spec)
    slot = first_slot
    for message in _messages(parts):
        at = [i for i, part in enumerate(message) if isinstance(part, Passage)]
        for index, part in enumerate(message):
            if isinstance(part, Text):
                yield _Piece(encoder.encode(part.text, part.special))
                continue
            if spec.mem_start is not None and index == at[0]:
                yield _Piece([spec.mem_start])
            yield _passage_piece(part.document, slot, encoder, spec)
            yield _Piece(spec.link_ids(slot))
            if spec.mem_end is not None and index == at[-1]:
                yield _Piece([spec.mem_end])
            slot += 1


def _messages(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts grouped into messages: a special Text stands alone and ends the one before it."""
    message: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and part.special:
            yield message
            yield [part]
            message = []
        elif isinstance(part, Text | Passage):
            message.append(part)
        else:
            raise PromptError(f"found a {type(part).__name__}, expected Text or Passage parts")
    yield message


def _check_slots(passages: int, spec: Spec) -> None:
    if spec.max_passages is not None and passages > spec.max_passages:
        raise TooManyPassages(
            f"found {passages} passages in the prompt, expected at most {spec.max_passages}: this "
            "model has link tokens for no more; hand over fewer (kvlink-rag: a smaller -k), or the "
            "rest as text"
        )


def _passage_piece(document: Document, slot: int, encoder: PartEncoder, spec: Spec) -> _Piece:
    ids = encoder.encode(spec.render_passage(document, slot))
    if not ids:
        raise PromptError(f"passage {document.id or document.title!r} has no tokens")
    return _Piece(ids, document, slot)
