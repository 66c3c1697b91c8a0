"""Recognised passages that become text again where a prompt would be too long with them.

A passage takes more room than the text it was recognised in: its title and link tokens. What fits
as text must still fit, and leave the answer its room. Knows parts and a prompt
format; knows no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvlink_rag.documents import Part, Passage, Text

from .format import PromptFormat
from .layout import layout


def fit(
    format: PromptFormat, parts: Sequence[Part], room: int, *, given: Collection[int] = ()
) -> list[Part]:
    """`parts`, with passages from the end turned into text until `room` tokens are left.

    Where text alone would leave less than `room`, as much as it would leave is enough. given: the
    `id()` of passages that were not recognised; they stay.
    """
    fitted = list(parts)
    if _at_most(format, fitted) <= format.window - room:
        return fitted
    most = max(format.window - room, _tokens(format, [_as_text(p, given) for p in fitted]))
    for at in range(len(fitted) - 1, -1, -1):
        if _tokens(format, fitted) <= most:
            break
        fitted[at] = _as_text(fitted[at], given)
    return fitted


def _as_text(part: Part, given: Collection[int]) -> Part:
    if isinstance(part, Text) or id(part) in given:
        return part
    return Text(part.document.text.strip())


def _tokens(format: PromptFormat, parts: Sequence[Part]) -> int:
    return len(layout(parts, format.tokenizer, format.spec))


def _at_most(format: PromptFormat, parts: Sequence[Part]) -> int:
    """A bound on tokens that costs nothing: one a byte, and the link tokens."""
    spec, count = format.spec, 0
    for part in parts:
        if isinstance(part, Passage):
            count += len(spec.render_passage(part.document).encode()) + spec.links_per_passage + 2
        else:
            count += len(part.text.encode("utf-8", "replace"))
    return count
