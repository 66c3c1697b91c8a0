"""Invented proper names of a stem and an ending, or of any syllables, in two disjoint splits.

Knows how names look; knows nothing about facts or questions. An invented word belongs to one
split for good (by a checksum of its letters), so a name of the held-out split never stands in
training text, while its stem and its ending do. Answers can therefore only be read from the
documents, not remembered. Given names are ordinary ones, shared by both splits: a person is
told by the family name.
"""

from __future__ import annotations

import random
import zlib
from typing import Literal

Split = Literal["train", "heldout"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = _words("b br c d dr f fl g gr h j k kr l m n p pr r s st t tr v w z th sh")
_VOWELS = _words("a e i o u")
_CODAS = _words("l n r s v m k")
_STEMS = 400
_STARTS = ("", *_ONSETS, "qu", "x", "y", "ch", "pl", "sw")
_STOPS = ("", "", "", *_CODAS, "d", "t", "x", "ng", "st", "lle", "cque")

GIVEN = {
    "she": _words(
        "Ann Ada Alma Bea Carla Clara Dora Edith Ella Emma Eva Fay Flora Grace Greta Hana Helen "
        "Ida Iris Ivy Jane Julia Kate Laura Lea Lena Lily Lucy Mabel Maria Mary May Mia Nina Nora "
        "Olga Petra Rita Rosa Ruth Sara Sofia Tina Uma Vera Wanda Zoe Amy"
    ),
    "he": _words(
        "Abel Adam Alan Anton Axel Ben Boris Carl Colin Dan Dirk Erik Felix Finn Frank Fred Georg "
        "Glen Hans Hugo Igor Ivan Jack James Jan Joel John Jonas Karl Kurt Leo Liam Luke Marc Max "
        "Neil Nils Otto Owen Paul Peter Ralf Rolf Sam Simon Tom Viktor Walt"
    ),
}
ENDINGS = {
    "family": _words(
        "teld venn rosk mart lind quist berg stone wyn garth nell dahl moor vic tano rell sby hart"
    ),
    "town": _words(
        "nik ham mouth wick ford stad burg dale port bury haven field lund mere ton gate holm crest"
    ),
    "river": _words("na rel une vash dra mo lle sk tta wen"),
    "region": _words("nia land mark shire via stan ria more"),
    "company": _words("vex tek trix nova lon gen dyne phon corp mex tra zon"),
    "project": _words("mora lux rion tis thea cor nimbus dax pheus ros vant lia"),
    "product": _words("lo vox rin pex tor zy ma dell kit que"),
    "museum": _words("ville court ley hall den croft man worth"),
}


def _by_checksum(words: list[str]) -> list[str]:
    return sorted(words, key=lambda word: zlib.crc32(word.encode()))


STEMS = tuple(
    sorted(_by_checksum([o + v + c for o in _ONSETS for v in _VOWELS for c in _CODAS])[:_STEMS])
)


def split_of(word: str) -> Split:
    """The split that owns a word: one word in six is held out, by CRC-32."""
    return "heldout" if zlib.crc32(word.encode()) % 6 == 0 else "train"


class Names:
    """Draws fresh words of one split; a word is given out once per object.

    strange: words of one to four syllables, as names of the real world may be to the model.
    """

    def __init__(self, rng: random.Random, split: Split, *, strange: bool = False) -> None:
        self._rng = rng
        self._split = split
        self._strange = strange
        self._used: set[str] = set()

    def word(self, kind: str) -> str:
        """A capitalised word of this kind ("family", "town", ...), not drawn before."""
        while True:
            word = (self._syllables() if self._strange else self._spell(kind)).capitalize()
            if split_of(word) == self._split and word not in self._used:
                self._used.add(word)
                return word

    def given(self, pronoun: str) -> str:
        """A given name that goes with "she" or "he"; may come again."""
        if self._strange and self._rng.random() < 0.5:
            return self._syllables().capitalize()
        return self._rng.choice(GIVEN[pronoun])

    def _spell(self, kind: str) -> str:
        return self._rng.choice(STEMS) + self._rng.choice(ENDINGS[kind])

    def _syllables(self) -> str:
        rng = self._rng
        count = rng.choice((1, 2, 2, 2, 3, 3, 4))
        sounds = (_STARTS, _VOWELS, _STOPS) * count
        return "".join(rng.choice(each) for each in sounds)
