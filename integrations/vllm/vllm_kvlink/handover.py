"""A prompt on its way from whoever lays it out to whoever prefills it.

vLLM carries three things for us: token ids (of its own vocabulary, so added rows stand as
placeholders), a cache salt, and parameters of the transfer. Knows layouts as numbers; knows neither
vLLM nor documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlink_rag import Document, Layout
from kvlink_rag.errors import PromptError
from kvlink_rag.prompt.layout import Span

KEY = "kvlink_layout"  # among `kv_transfer_params`
SALT = "kvlink:"  # begins every cache salt of ours, and no one else's
PLACEHOLDER = 0  # the id that an added row has for vLLM; its keys and values are never computed
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Handover:
    """A prompt as it is prefilled: token ids, and which stretches `[start, stop)` are passages.

    tenant: whose prompt it is; neither pages nor computed runs are shared between tenants.
    """

    token_ids: tuple[int, ...]
    passages: tuple[tuple[int, int], ...] = ()
    tenant: str = ""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise PromptError("found a layout without tokens, expected those of a prompt")
        edges = [edge for passage in self.passages for edge in passage]
        whole = all(start < stop for start, stop in self.passages)
        if not whole or edges != sorted(edges) or (edges and edges[0] < 0):
            raise PromptError(
                f"found passages {self.passages}, expected stretches [start, stop) in order"
            )
        if edges and edges[-1] >= len(self.token_ids):
            raise PromptError(
                f"found a passage that ends at {edges[-1]} in a prompt of {len(self.token_ids)} "
                "tokens, expected computed text behind it"
            )

    @classmethod
    def of(cls, layout: Layout, tenant: str = "") -> Handover:
        """That of a prompt laid out by kvlink_rag."""
        passages = tuple((span.start, span.stop) for span in layout.passages)
        return cls(tuple(layout.token_ids.tolist()), passages, tenant)

    @property
    def salt(self) -> str:
        """The cache salt: a digest of all that the prompt's keys and values depend on.

        Pages of vLLM's prefix cache are found by salt and ids. The ids do not say which rows are
        link tokens of which slot, nor which stretches are passages; this does.
        """
        facts = [FORMAT, self.token_ids, self.passages, self.tenant]
        return SALT + hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def placeholders(self, vocabulary: int) -> list[int]:
        """The ids that vLLM is given, all below its `vocabulary`."""
        return [id if id < vocabulary else PLACEHOLDER for id in self.token_ids]

    def check(self, token_ids: Sequence[int], salt: str | None, vocabulary: int) -> None:
        """Raise `PromptError` where a request's ids or salt are not this prompt's."""
        if list(token_ids) != self.placeholders(vocabulary):
            raise PromptError(
                "the token ids of the request are not those of its layout; send the ids that "
                "Handover.placeholders gives"
            )
        if self.token_ids[-1] >= vocabulary:
            raise PromptError(
                f"the prompt ends with the added token {self.token_ids[-1]}, which vLLM "
                f"(vocabulary {vocabulary}) cannot compute; end it with text"
            )
        if salt != self.salt:
            raise PromptError(
                f"found the cache salt {salt!r}, expected the layout's, {self.salt!r}: without it "
                "vLLM would take these pages for those of other prompts; send Handover.salt"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain values, for `kv_transfer_params`."""
        passages = [list(passage) for passage in self.passages]
        return {
            "format": FORMAT,
            "token_ids": list(self.token_ids),
            "passages": passages,
            "tenant": self.tenant,
        }

    @classmethod
    def from_json(cls, value: object) -> Handover:
        """Read `to_json`. Raises `PromptError`."""
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise PromptError(f"found {KEY}={value!r:.80}, expected a layout of format {FORMAT}")
        ids: Any = value.get("token_ids")
        passages: Any = value.get("passages")
        tenant = value.get("tenant")
        pairs = isinstance(passages, list | tuple) and all(_is_ids(p, 2) for p in passages)
        if not _is_ids(ids) or not pairs or not isinstance(tenant, str):
            raise PromptError(
                f"found another {KEY} than Handover.to_json makes: expected token_ids and pairs of "
                "passages as integers, and tenant as text"
            )
        return cls(tuple(ids), tuple((p[0], p[1]) for p in passages), tenant)

    def layout(self, header: tuple[int, ...]) -> Layout:
        """The layout to prefill; `header` is that of the model's spec."""
        segments = torch.zeros(len(self.token_ids), dtype=torch.int64)
        for number, (start, stop) in enumerate(self.passages, 1):
            segments[start:stop] = number
        return Layout(
            token_ids=torch.tensor(self.token_ids, dtype=torch.int64),
            positions=torch.arange(len(self.token_ids), dtype=torch.int64),
            segments=segments,
            spans=tuple(self._spans()),
            header=header,
        )

    def _spans(self) -> Iterator[Span]:
        at = 0
        for number, (start, stop) in enumerate(self.passages):
            if at < start:
                yield Span(at, start)
            yield Span(start, stop, Document("", id=f"passage {number}"), number)
            at = stop
        yield Span(at, len(self.token_ids))


def _is_ids(value: Any, count: int | None = None) -> bool:
    """Whether `value` is a list of ids, of so many where that is said."""
    if not isinstance(value, list | tuple) or (count is not None and len(value) != count):
        return False
    return all(type(each) is int and each >= 0 for each in value)
