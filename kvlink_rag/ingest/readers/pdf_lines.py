"""The order of a PDF page's lines and letters, where its drawing order is not the reading order.

Columns that were drawn line by line, and right-to-left letters that come out backwards. Knows text
as pypdf gives it; knows no PDF.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_ROWS = 3  # lines side by side that make two columns
_GAP = re.compile(r"(?<=\S) {3,}(?=\S)")  # between columns, in a line
_SWAY = 10  # signs by which a column's beginning may differ from line to line
_WORDS = 3.0  # in a line of a column on average: a table's cells have fewer
_CONTINUED = 1 / 3  # of a column's lines that begin within a sentence
# Right-to-left letters, with the spaces and signs between them.
_RTL = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff"
_LINE = re.compile(rf"[^\w\n]*[{_RTL}](?:[{_RTL}]|[^\w\n])*")
# Letters that end a word: Hebrew's final forms, ta marbuta and alef maksura.
_FINAL = "\u05da\u05dd\u05df\u05e3\u05e5\u0629\u0649"
_ENDS = re.compile(rf"(?<=[{_RTL}])[{_FINAL}](?![{_RTL}])|(?<![{_RTL}])\u0627\u0644(?=[{_RTL}])")
_BEGINS = re.compile(rf"(?<![{_RTL}])[{_FINAL}](?=[{_RTL}])|(?<=[{_RTL}])\u0644\u0627(?![{_RTL}])")
_STOP_LAST = re.compile(rf"[{_RTL}] ?[.\u061f\u06d4]$", re.MULTILINE)
_STOP_FIRST = re.compile(rf"^[.\u061f\u06d4] ?[{_RTL}]", re.MULTILINE)


def turned(text: str) -> str:
    """`text`, its right-to-left runs turned round where they stand backwards.

    By letters that only end words, and by where sentences have their stops. pypdf turns such runs
    once, which is right only for files that draw from the left.
    """
    backwards = len(_BEGINS.findall(text)) + len(_STOP_FIRST.findall(text))
    forwards = len(_ENDS.findall(text)) + len(_STOP_LAST.findall(text))
    if backwards <= forwards:
        return text
    return _LINE.sub(lambda run: _reversed(run[0]), text)


def _reversed(run: str) -> str:
    """Backwards; spaces at its ends stay there."""
    core = run.strip()
    start = run.index(core) if core else 0
    return run[:start] + core[::-1] + run[start + len(core) :]


def side_by_side(places: Sequence[tuple[float, float]]) -> bool:
    """Whether strings drawn at `places` (x, y), in that order, are lines beside lines."""
    second: list[int] = []
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        if abs(next_y - y) < 2 and next_x - x > 20:
            second.append(round(next_x / 4))
    return any(second.count(x) >= _ROWS for x in set(second))


def columns_apart(layout: str) -> str | None:
    """The text of a page laid out with spaces, one column after the other; None if it has none.

    Only prose is taken for columns: lines of a table belong together.
    """
    lines, found, start, some = layout.splitlines(), [], 0, False
    while start < len(lines):
        rows = _columns_at(lines, start)
        if rows is None:
            found.append(" ".join(lines[start].split()))
            start += 1
            continue
        for side in zip(*rows, strict=True):
            column = "\n".join(side)
            apart = columns_apart(column)
            found.append(apart or "\n".join(" ".join(row.split()) for row in side))
        start, some = start + len(rows), True
    return re.sub(r"\n{2,}", "\n", "\n".join(found)).strip() if some else None


def _columns_at(lines: Sequence[str], start: int) -> list[tuple[str, str]] | None:
    """The lines from `start` on as two columns of prose, each line cut; None if they are not."""
    for gap in _GAP.finditer(lines[start]):
        cut = (_cut(line, gap.end()) for line in lines[start:])
        rows = list(itertools.takewhile(lambda row: row is not None, cut))
        if _is_prose(found := [row for row in rows if row is not None]):
            return found
    return None


def _cut(line: str, gutter: int) -> tuple[str, str] | None:
    """A line's left and right part, of which one may be empty; None if it goes over the gutter."""
    for gap in _GAP.finditer(line):
        if abs(gap.end() - gutter) <= _SWAY:
            return line[: gap.start()], line[gap.end() :]
    if abs(len(line) - len(line.lstrip()) - gutter) <= _SWAY:
        return "", line.strip()
    return (line, "") if len(line.rstrip()) < gutter - _SWAY else None


def _is_prose(rows: Sequence[tuple[str, str]]) -> bool:
    sides = [[side.split() for side in sides if side.strip()] for sides in zip(*rows, strict=True)]
    if any(len(s) < _ROWS or sum(map(len, s)) < _WORDS * len(s) for s in sides) or not sides:
        return False
    later = [words[0] for side in sides for words in side[1:]]
    return bool(later) and sum(w[0].islower() for w in later) >= _CONTINUED * len(later)
