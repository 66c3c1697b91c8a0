"""The index of known texts by how they begin, and where a prompt holds one of them.

Knows characters, hashes and rows; knows no catalog and no rule about what may be a passage.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .lookalikes import begun, codes
from .lookalikes import heads as loose_heads
from .stretches import Stretch

HEAD = 32  # characters of a text that are looked up first
NECK = 256  # characters compared next where at least `CROWD` texts have one head
CROWD = 64
LONGEST = (1 << 24) - 1  # characters; no window holds a longer passage
AT_ONCE = 1 << 15  # places of a prompt looked up together
PATIENCE = 1 << 24  # characters and rows looked at for one prompt, besides eight a character
BRACKETS = frozenset("<>[](){}\"'`|*#~«»“”„‘’‹›")  # of tags, quotes, fences and tables
LEADS = frozenset(":=-–—•·")  # after a label or a bullet
LOOK = 512  # what looking at one place costs of it

Array = npt.NDArray[Any]

logger = logging.getLogger(__name__)

_MULTIPLIER = np.uint64(secrets.randbits(64) | 1)
_LENGTH = np.uint64(LONGEST)
_HASH = np.uint64(~LONGEST & (1 << 64) - 1)
_SEED = secrets.randbits(64)
ENTRY = np.dtype(
    [("digest", np.uint64), ("row", np.int64), ("neck", np.uint32), ("loose", np.uint64)]
)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Known texts, sorted by the hash of their first `HEAD` characters and then by length.

    heads: uint64 [n], 40 bits of hash and 24 of length. entries: `ENTRY` [n]. sizes: the head
    lengths that occur. titles: of documents with one text, filled as they are met. loose: heads as
    `lookalikes` takes them, sorted, with the lengths of their texts, made when first asked for.
    Apart from these never changed: another version is another table.
    """

    version: int = 0
    heads: Array = field(default_factory=lambda: np.empty(0, np.uint64))
    entries: Array = field(default_factory=lambda: np.empty(0, ENTRY))
    sizes: frozenset[int] = frozenset()
    titles: dict[int, dict[str, int]] = field(default_factory=dict)
    loose: tuple[Array, Array] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.heads.nbytes + self.entries.nbytes

    def changed(self, version: int, rows: Sequence[int], texts: Iterable[tuple[int, str]]) -> Table:
        """This table without `rows`, and with `texts` (row, text)."""
        heads, entries = self.heads, self.entries
        gone = np.isin(entries["row"], np.array(rows, dtype=np.int64))
        if gone.any():
            heads, entries = heads[~gone], entries[~gone]
        new_heads, new_entries = _hashed(texts)
        at = np.searchsorted(heads, new_heads)
        heads = np.insert(heads, at, new_heads)
        sizes = np.bincount(np.minimum(heads & _LENGTH, HEAD).astype(np.int64)).nonzero()[0]
        entries = np.insert(entries, at, new_entries)
        return Table(version, heads, entries, frozenset(sizes.tolist()))

    def matches(self, prompt: str) -> list[Stretch]:
        """Every stretch of `prompt` that is a known text and does not begin or end in a word."""
        if not len(self.heads) or not prompt:
            return []
        letters = codes(prompt)
        kind = np.full(len(letters) + 2, _SPACE, dtype=np.uint8)
        kind[1:-1] = _KINDS[np.minimum(letters, len(_KINDS) - 1)]
        border = (kind[:-1] != _WORD) | (kind[1:] != _WORD)
        starts = np.flatnonzero(border[:-1] & (kind[1:-1] != _SPACE))
        found: list[Stretch] = []
        patience = PATIENCE + 8 * len(prompt)
        for start, low in self._probe(letters, starts):
            near = self._near(low, prompt[start : start + NECK])
            stops = start + (self.heads[near] & _LENGTH).astype(np.int64)
            fit = border[np.minimum(stops, len(prompt))] & (stops <= len(prompt))
            near, stops = near[fit], stops[fit]
            patience -= LOOK + len(fit)
            for stop in np.unique(stops).tolist():
                patience -= stop - start
                if patience < 0:
                    logger.warning("the prompt looks like too many passages; the rest is computed")
                    return found
                same = self.entries[near[stops == stop]]
                rows = same["row"][same["digest"] == _digest(prompt[start:stop])].tolist()
                if rows:
                    sides = int(kind[start]), int(kind[stop + 1])
                    free = (sides[0] in _OPENS, sides[1] in _CLOSES)
                    loose = (sides[0] != _WORD, sides[1] != _WORD)
                    found.append(Stretch(start, stop, tuple(sorted(rows)), free, loose))
        return found

    def begun(self, prompt: str) -> list[tuple[int, int]]:
        """Where a known text seems to begin, and where it would end; see `lookalikes`."""
        if self.loose is None:
            order = np.lexsort((self.heads & _LENGTH, self.entries["loose"]))
            loose = self.entries["loose"][order]
            last = np.append(loose[1:] != loose[:-1], True) & (loose != 0)  # the longest of each
            lengths = (self.heads & _LENGTH)[order[last]].astype(np.int64)
            object.__setattr__(self, "loose", (loose[last], lengths))
        assert self.loose is not None
        return begun(prompt, *self.loose)

    def _probe(self, letters: Array, starts: Array) -> Iterator[tuple[int, int]]:
        """Positions where a known head stands, and the first place of that head in the table."""
        padded = np.concatenate([letters, np.zeros(HEAD, letters.dtype)])
        for first in range(0, len(starts), AT_ONCE):
            yield from sorted(self._probe_some(padded, starts[first : first + AT_ONCE]))

    def _probe_some(self, padded: Array, starts: Array) -> list[tuple[int, int]]:
        hashes = np.zeros(len(starts), dtype=np.uint64)
        found: list[tuple[int, int]] = []
        for size in range(1, HEAD + 1):
            hashes = hashes * _MULTIPLIER + padded[starts + (size - 1)]
            if size in self.sizes:
                keys = _key(hashes, size)
                low = np.searchsorted(self.heads, keys)
                hit = self.heads[np.minimum(low, len(self.heads) - 1)] & _HASH == keys
                found += zip(starts[hit].tolist(), low[hit].tolist(), strict=True)
        return found

    def _near(self, low: int, beginning: str) -> Array:
        """Places of the texts with the head at `low`; of many, those that go on as `beginning`."""
        high = int(np.searchsorted(self.heads, self.heads[low] | _LENGTH, side="right"))
        if high - low < CROWD:
            return np.arange(low, high)
        necks = self.entries["neck"][low:high]
        places: Array = low + np.flatnonzero((necks == 0) | (necks == _neck(beginning)))
        return places


def _hashed(texts: Iterable[tuple[int, str]]) -> tuple[Array, Array]:
    """Heads and entries of texts, sorted by head."""
    stripped = ((row, text.strip()) for row, text in texts)
    known = ((row, text) for row, text in stripped if 0 < len(text) <= LONGEST)
    heads, entries = [np.empty(0, np.uint64)], [np.empty(0, ENTRY)]
    while batch := list(islice(known, 1024)):
        heads.append(_heads([text for _, text in batch]))
        loose = loose_heads([text for _, text in batch]).tolist()
        values = [
            (_digest(t), row, _neck(t), head) for (row, t), head in zip(batch, loose, strict=True)
        ]
        entries.append(np.array(values, dtype=ENTRY))
    order = np.argsort(np.concatenate(heads), kind="stable")
    return np.concatenate(heads)[order], np.concatenate(entries)[order]


def _heads(texts: Sequence[str]) -> Array:
    """uint64 [texts]: hash of the first characters, and length."""
    joined = "".join(text[:HEAD].ljust(HEAD, "\0") for text in texts)
    letters = codes(joined).reshape(len(texts), HEAD).astype(np.uint64)
    lengths = np.array([len(text) for text in texts], dtype=np.uint64)
    sizes = np.minimum(lengths, HEAD)
    hashes = np.zeros(len(texts), dtype=np.uint64)
    for i in range(HEAD):
        hashes = np.where(i < sizes, hashes * _MULTIPLIER + letters[:, i], hashes)
    return _key(hashes, sizes) | lengths


def _key(hashes: Array, size: Array | int) -> Array:
    mixed = (hashes * _MULTIPLIER + np.asarray(size, dtype=np.uint64)) * _MULTIPLIER
    key: Array = mixed & _HASH
    return key


def _digest(text: str) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), _SEED))


def _neck(text: str) -> int:
    """Hash of the first `NECK` characters, 32 bits; 0 where there are fewer."""
    return 0 if len(text) < NECK else _digest(text[:NECK]) & 0xFFFFFFFF or 1


def _kind(character: str) -> int:
    if character.isspace():
        return _SPACE
    if character.isalnum():
        return _WORD
    return _BRACKET if character in BRACKETS else _LEAD if character in LEADS else _OTHER


_SPACE, _WORD, _OTHER, _BRACKET, _LEAD = range(5)
_CLOSES = (_SPACE, _BRACKET)  # what may stand right behind a passage
_OPENS = (*_CLOSES, _LEAD)  # and right before one
_KINDS = np.array([_kind(chr(code)) for code in range(1 << 16)], dtype=np.uint8)
