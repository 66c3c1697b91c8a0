"""Pieces of one line of text to the line: what was apart on the page stays apart in it.

10<sup>9</sup> is 10^9, a raised mark after a word [2], struck-out text ~~so~~. Knows no tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

_ORDINALS = frozenset(
    [
        "st",
        "nd",
        "rd",
        "th",
        "e",
        "er",
        "re",
        "ère",
        "ème",
        "º",
        "ª",
        "o",
        "a",
        "tm",
        "sm",
        "®",
        "™",
        "©",
    ]
)
_SIMPLE = re.compile(r"[+−–-]?[\w.]+")
_MARK = re.compile(r"[*†‡§¶]+|[\[(].*[\])]", re.DOTALL)  # stands apart from a number by itself


@dataclass(frozen=True, slots=True)
class Text:
    """Text as it is. struck: a line goes through it."""

    text: str
    struck: bool = False


@dataclass(frozen=True, slots=True)
class Edge:
    """Something without text was here (a picture's border, a button's): words do not join."""


@dataclass(frozen=True, slots=True)
class Script:
    """Text that stands higher or lower. note: it is a reference, not a part of a number."""

    text: str
    raised: bool
    note: bool = False
    struck: bool = False


Piece = Text | Edge | Script


def joined(pieces: Sequence[Piece]) -> str:
    """The line that `pieces` make."""
    runs = groupby(_apart(pieces), key=lambda piece: piece.struck)
    out: list[str] = []
    for struck, run in runs:
        text = "".join(piece.text for piece in run)
        before = out[-1][-1:] if out else ""
        if before == "~" and text[:1].isalnum():
            out.append(" ")
        out.append(_struck(text) if struck else text)
    return "".join(out)


def _struck(text: str) -> str:
    """Marked line by line, white space outside the marks."""
    return re.sub(r"\S(?:[^\n]*\S)?", lambda match: f"~~{match[0]}~~", text)


def _apart(pieces: Sequence[Piece]) -> Iterator[Text]:
    """All pieces as text, with spaces where they would join to something else."""
    last, edge = "", False  # the character before, and whether words may not go on after it
    lowered = False  # … nor numbers
    for place, piece in enumerate(pieces):
        if isinstance(piece, Edge):
            edge = True
            continue
        text = piece.text
        if isinstance(piece, Script):
            text = _script(
                piece, last, pieces[place + 1 : place + 3], pieces[max(place - 2, 0) : place]
            )
        if not text:
            continue
        if (edge and last.isalnum() and text[0].isalnum()) or (lowered and text[0].isdigit()):
            text = " " + text
        yield Text(text, piece.struck)
        last, edge = text[-1], isinstance(piece, Script) and piece.raised
        lowered = isinstance(piece, Script) and not piece.raised and last.isdigit()


def _script(piece: Script, last: str, after: Sequence[Piece], before: Sequence[Piece]) -> str:
    text = piece.text.strip()
    if not text or not last or last.isspace() or _MARK.fullmatch(text):
        return text
    if piece.raised and _is_fraction([piece, *after]):
        return f" {text}" if last.isalnum() else text
    if _is_fraction([*before, piece]):
        return text
    if piece.raised and (piece.note or not (last.isalnum() or last in ")]}")):
        return f"[{text}]"
    follows = after[0].text[:1] if after and isinstance(after[0], Text) else ""
    if piece.raised and text.lower() in _ORDINALS and not follows.isdigit():
        return text
    simple = text if _SIMPLE.fullmatch(text) else f"({text})"
    if not piece.raised and not last.isdigit() and not follows.isdigit():
        return simple
    return ("^" if piece.raised else "_") + simple


def _is_fraction(pieces: Sequence[Piece]) -> bool:
    """A raised piece, a slash, a lowered one."""
    if len(pieces) != 3:
        return False
    above, slash, below = pieces
    return (
        isinstance(above, Script)
        and isinstance(slash, Text)
        and isinstance(below, Script)
        and above.raised
        and slash.text.strip() in ("/", "\u2044")
        and not below.raised
    )
