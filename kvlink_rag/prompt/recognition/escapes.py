"""Text as `json.dumps` and `repr` write it, read back with the place of each character.

Knows escapes; knows no passage. Only what such writers make is undone: anything else stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\u([dD][89abAB]{_HEX}{{2}})\\u([dD][c-fC-F]{_HEX}{{2}})"  # a pair of surrogates
    rf"|\\u({_HEX}{{4}})|\\x({_HEX}{{2}})|\\U({_HEX}{{8}})|\\([\\\"'/bfnrt])"
)
_PLAIN = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Unescaped:
    """A text without its escapes; places: where each character began, and the text's end."""

    text: str
    places: list[int]


def unescaped(text: str) -> Unescaped:
    """`text` with its escapes undone."""
    pieces: list[str] = []
    places: list[int] = []
    at = 0
    for escape in _ESCAPE.finditer(text):
        pieces += (text[at : escape.start()], _meant(escape))
        places += range(at, escape.start())
        places += [escape.start()] * len(pieces[-1])
        at = escape.end()
    places += range(at, len(text) + 1)
    return Unescaped("".join([*pieces, text[at:]]), places)


def _meant(escape: re.Match[str]) -> str:
    high, low, *codes, plain = escape.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    if plain:
        return _PLAIN.get(plain, plain)
    code = int(next(code for code in codes if code), 16)
    return chr(code) if code < 0x110000 else escape.group()
