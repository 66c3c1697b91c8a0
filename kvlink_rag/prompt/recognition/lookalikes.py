"""Where a prompt holds what looks like a known text, however indented or its letters composed.

Texts are compared by their first `HEAD` letters, without white space and accents. Knows characters
and hashes; knows no rows and no rule.
"""

from __future__ import annotations

import itertools
import secrets
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

HEAD = 24  # letters that are compared
_WITHIN = 512  # characters of a text in which they are looked for
MOST = 256  # places of a prompt that are told

Array = npt.NDArray[Any]

_MULTIPLIER = np.uint64(secrets.randbits(64) | 1)


def codes(text: str) -> Array:
    """Code points, uint32 [characters]."""
    found: Array = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return found


def heads(texts: Sequence[str]) -> Array:
    """uint64 [texts]: a hash of how each begins; 0 for a text that is too short to tell."""
    found = [_head(text) for text in texts]
    long = np.array([len(head) == HEAD for head in found], dtype=bool)
    signs = codes("".join(head.ljust(HEAD, "\0") for head in found))
    return np.where(long, _hashes(signs, np.arange(0, len(signs), HEAD)), np.uint64(0))


def _head(text: str) -> str:
    start = "".join(text[: 2 * HEAD].split())
    if len(start) < HEAD:
        start = "".join(text[:_WITHIN].split())
    if start.isascii():
        return start[:HEAD]
    return "".join(itertools.islice(itertools.chain.from_iterable(map(_signs, start)), HEAD))


def begun(prompt: str, known: Array, lengths: Array) -> list[tuple[int, int]]:
    """Where known texts seem to begin, and where to end.

    known: uint64 [texts], sorted: their heads. lengths: int64 [texts], in characters.
    """
    bare, places = _bare(prompt)
    if len(bare) < HEAD or not len(known):
        return []
    before = np.concatenate([[True], (np.diff(places) > 1) | ~_are_letters(bare[:-1])])
    starts = np.flatnonzero(before[: len(bare) - HEAD + 1])
    hashes = _hashes(bare, starts)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    hits = known[at] == hashes
    found: list[tuple[int, int]] = []
    end = 0
    for start, length in zip(
        places[starts[hits]].tolist(), lengths[at[hits]].tolist(), strict=True
    ):
        if start >= end and len(found) < MOST:
            end = min(start + length, len(prompt))
            found.append((start, end))
    return found


def _bare(text: str) -> tuple[Array, Array]:
    """Code points without white space and accents, and the place of each in `text`."""
    if text.isascii():
        found = codes(text)
        places = np.flatnonzero((found > 32) & (found != 127))
        return found[places], places
    kept = [(at, sign) for at, letter in enumerate(text) for sign in _signs(letter)]
    if not kept:
        return np.empty(0, np.uint32), np.empty(0, np.intp)
    return codes("".join(sign for _, sign in kept)), np.array([at for at, _ in kept], np.intp)


@lru_cache(1 << 14)
def _signs(letter: str) -> str:
    """What is compared of a letter: its parts but accents; nothing of white space."""
    if letter.isascii():
        return letter if letter > " " else ""
    parts = unicodedata.normalize("NFD", letter)
    return "".join(p for p in parts if not (p.isspace() or unicodedata.combining(p)))


def _are_letters(bare: Array) -> Array:
    return np.fromiter((chr(code).isalnum() for code in bare.tolist()), bool, len(bare))


def _hashes(bare: Array, starts: Array) -> Array:
    """uint64 [starts]: of the `HEAD` signs from each place on; never 0."""
    found: Array = np.zeros(len(starts), np.uint64)
    for i in range(HEAD):
        found = found * _MULTIPLIER + bare[starts + i]
    found |= np.uint64(1)
    return found
