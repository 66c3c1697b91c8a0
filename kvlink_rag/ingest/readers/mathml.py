"""Formulas in MathML to a line of text: x^2, a/b, √(x). Knows the elements' places, no mathematics.

After MathML Core (W3C). What stands deeper than `_DEPTH` loses its structure, not its text.
"""

from __future__ import annotations

import re

_DEPTH = 64
_TOKENS = frozenset(("mi", "mn", "mo", "ms", "mtext"))
_DROPPED = frozenset(("annotation", "annotation-xml", "mphantom", "mspace"))
_INVISIBLE = re.compile("[\u2061-\u2064]")  # apply, times, comma, plus
_PLAIN = re.compile(r"[\w.,]*")


class Formula:
    """A formula as its tags come in."""

    def __init__(self) -> None:
        self._open: list[tuple[str, list[str]]] = [("math", [])]

    def start(self, name: str) -> None:
        """An element begins."""
        if len(self._open) < _DEPTH:
            self._open.append((name, []))

    def text(self, text: str) -> None:
        """Text of an element."""
        if piece := " ".join(_INVISIBLE.sub("", text).split()):
            self._open[-1][1].append(piece)

    def end(self, name: str) -> None:
        """An element ends, with all that is open in it."""
        if any(name == open_name for open_name, _ in self._open[1:]):
            while self._close() != name:
                pass

    def line(self) -> str:
        """The whole formula."""
        while len(self._open) > 1:
            self._close()
        return " ".join(filter(None, self._open[0][1]))

    def _close(self) -> str:
        name, parts = self._open.pop()
        self._open[-1][1].append(_written(name, parts))
        return name


def _written(name: str, parts: list[str]) -> str:
    """An element by its parts: those that have places are filled up."""
    if name in _DROPPED:
        return ""
    if name in _TOKENS:
        return "".join(parts)
    first, second, third = (_group(part) for part in [*parts, "", "", ""][:3])
    by_place = {
        "msup": f"{first}^{second}",
        "mover": f"{first}^{second}",
        "msub": f"{first}_{second}",
        "munder": f"{first}_{second}",
        "msubsup": f"{first}_{second}^{third}",
        "munderover": f"{first}_{second}^{third}",
        "mfrac": f"{first}/{second}",
        "mroot": f"{second}√{first}",
    }
    if name in by_place and len(parts) > 1:
        return by_place[name]
    if name == "semantics":
        return parts[0] if parts else ""
    joined = {"mtable": "; ", "mtr": ", ", "mfenced": ", "}.get(name, " ").join(filter(None, parts))
    if name == "msqrt":
        return f"√{_group(joined)}"
    return f"({joined})" if name == "mfenced" else joined


def _group(part: str) -> str:
    return part if _PLAIN.fullmatch(part) else f"({part})"
