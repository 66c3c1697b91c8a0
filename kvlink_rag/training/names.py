"""Invented proper names from syllables, in two disjoint splits.

Knows how names look; knows nothing about facts or questions. A word belongs to one split for
good (by a checksum of its letters), so a name of the held-out split never stands in training
text, while its syllables do. Answers can therefore only be read from the documents, not
remembered.
"""

from __future__ import annotations

import random
import zlib
from typing import Literal

Split = Literal["train", "heldout"]

_ONSETS = [
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
    "th",
    "sh",
]
_VOWELS = ["a", "e", "i", "o", "u"]
_ENDINGS = {
    "given": [
        "lan",
        "ra",
        "mia",
        "ven",
        "dor",
        "lie",
        "nna",
        "rik",
        "tess",
        "vale",
        "sa",
        "min",
        "bert",
        "dine",
        "lo",
        "xa",
        "ron",
        "phie",
        "das",
        "mel",
    ],
    "family": [
        "teld",
        "venn",
        "rosk",
        "mart",
        "lind",
        "quist",
        "berg",
        "stone",
        "wyn",
        "garth",
        "nell",
        "dahl",
        "moor",
        "vic",
        "tano",
        "rell",
        "sby",
        "hart",
    ],
    "town": [
        "nik",
        "ham",
        "mouth",
        "wick",
        "ford",
        "stad",
        "burg",
        "dale",
        "port",
        "bury",
        "haven",
        "field",
        "lund",
        "mere",
        "ton",
        "gate",
        "holm",
        "crest",
    ],
    "river": ["na", "rel", "une", "vash", "dra", "mo", "lle", "sk", "tta", "wen"],
    "region": ["nia", "land", "mark", "shire", "via", "stan", "ria", "more"],
    "company": [
        "vex",
        "tek",
        "trix",
        "nova",
        "lon",
        "gen",
        "dyne",
        "phon",
        "corp",
        "mex",
        "tra",
        "zon",
    ],
    "project": [
        "mora",
        "lux",
        "rion",
        "tis",
        "thea",
        "cor",
        "nimbus",
        "dax",
        "pheus",
        "ros",
        "vant",
        "lia",
    ],
    "product": ["lo", "vox", "rin", "pex", "tor", "zy", "ma", "dell", "kit", "que"],
    "museum": ["ville", "court", "ley", "hall", "den", "croft", "man", "worth"],
}
_MIDDLES = ["l", "r", "n", "m", "s", "t", "v", "d", "nd", "rt", "ll", "ss", "k", "g", "b"]


def split_of(word: str) -> Split:
    """The split that owns a word: one word in six is held out, by CRC-32."""
    return "heldout" if zlib.crc32(word.encode()) % 6 == 0 else "train"


class Names:
    """Draws fresh words of one split; a word is given out once per object."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng = rng
        self._split = split
        self._used: set[str] = set()

    def word(self, kind: str) -> str:
        """A capitalised word of this kind ("given", "town", ...), not drawn before."""
        while True:
            word = self._spell(kind)
            if split_of(word) == self._split and word not in self._used:
                self._used.add(word)
                return word

    def _spell(self, kind: str) -> str:
        rng = self._rng
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS)
        if rng.random() < 0.4:
            stem += rng.choice(_MIDDLES) + rng.choice(_VOWELS)
        return (stem + rng.choice(_ENDINGS[kind])).capitalize()
