"""Stretches of a prompt that are known texts, and which of them become passages.

Knows places; knows no text, no table and no question.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

SELECTIONS = 4  # times that passages are chosen anew without those found glued to something
SEPARATOR = 32  # characters between two passages that need no white space around them


@dataclass(frozen=True, slots=True)
class Stretch:
    """`prompt[start:stop]`, the stripped text of the documents in `rows`.

    free: whether white space or the prompt's end stands at its start, and at its stop.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    free: tuple[bool, bool] = (True, True)

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Closed:
    """`prompt[start:stop]`, which no passage may overlap; a longer one may hold it if `soft`."""

    start: int
    stop: int
    soft: bool = False

    def forbids(self, start: int, stop: int) -> bool:
        """Whether `[start, stop)` may not become a passage."""
        if stop <= self.start or self.stop <= start:
            return False
        holds = start <= self.start and self.stop <= stop
        return not (self.soft and holds and stop - start > self.stop - self.start)


def select(matches: Sequence[Stretch], closed: Sequence[Closed] = ()) -> list[Stretch]:
    """Stretches in order, none overlapping: of those that may be passages, the longest first.

    One must be free on both sides, or have another one there, no more than a separator away.
    """
    able = _open(matches, closed)
    for _ in range(SELECTIONS):
        taken = _longest_first(able)
        glued = _glued(taken)
        if not glued:
            break
        able = [s for s in able if s not in glued]  # what they hid may be one
    return [s for s in taken if s not in glued]


def _open(matches: Sequence[Stretch], closed: Sequence[Closed]) -> list[Stretch]:
    """The matches that nothing closed forbids."""
    if not closed:
        return list(matches)
    closed = sorted(closed, key=lambda c: c.start)
    starts, longest = [c.start for c in closed], max(c.stop - c.start for c in closed)

    def is_open(s: Stretch) -> bool:
        low, high = bisect.bisect(starts, s.start - longest), bisect.bisect(starts, s.stop)
        return not any(c.forbids(s.start, s.stop) for c in closed[low:high])

    return [s for s in matches if is_open(s)]


def _longest_first(found: Sequence[Stretch]) -> list[Stretch]:
    starts: list[int] = []
    taken: list[Stretch] = []
    for stretch in sorted(found, key=lambda s: (-len(s), s.start)):
        at = bisect.bisect(starts, stretch.start)
        before = at == 0 or taken[at - 1].stop <= stretch.start
        if before and (at == len(taken) or stretch.stop <= taken[at].start):
            starts.insert(at, stretch.start)
            taken.insert(at, stretch)
    return taken


def _glued(taken: Sequence[Stretch]) -> set[Stretch]:
    """Those that have neither white space nor another that stays at one of their sides."""
    gone: set[Stretch] = set()

    def near(left: int, right: int) -> bool:
        if left < 0 or right == len(taken) or gone & {taken[left], taken[right]}:
            return False
        return taken[right].start - taken[left].stop <= SEPARATOR

    waiting = list(range(len(taken)))
    while waiting:
        at = waiting.pop()
        left, right = taken[at].free
        stays = (left or near(at - 1, at)) and (right or near(at, at + 1))
        if not stays and taken[at] not in gone:
            gone.add(taken[at])
            waiting += [i for i in (at - 1, at + 1) if 0 <= i < len(taken)]
    return gone
