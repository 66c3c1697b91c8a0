"""The picture of a summary: the first score of each mode, with its interval. Knows matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlink_rag.errors import MissingExtra

from .summary import Line


def draw(lines: Sequence[Line], path: Path) -> None:
    """Write one figure: over the place of the gold document where that was varied, else bars.

    Raises `MissingExtra`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra.of("matplotlib", "eval", "drawing the figure") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    placed = [line for line in lines if line.gold_at is not None]
    if placed:
        _places(axes, placed)
    else:
        _bars(axes, [line for line in lines if line.kind is None and line.passages is None])
    axes.set_ylabel(f"{next(iter(lines[0].scores))}, % (95 % interval)")
    axes.set_ylim(0, None)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, lines: Sequence[Line]) -> None:
    found = [next(iter(line.scores.values())) for line in lines]
    several = len({(line.data_set, line.model) for line in lines}) > 1
    names = [
        f"{line.data_set}\n{line.model}\n{line.mode}" if several else line.mode for line in lines
    ]
    errors = [[100 * (i.mean - i.low) for i in found], [100 * (i.high - i.mean) for i in found]]
    axes.bar(range(len(found)), [100 * i.mean for i in found], yerr=errors, capsize=3)
    axes.set_xticks(range(len(found)), names)


def _places(axes: Any, lines: Sequence[Line]) -> None:
    for name in dict.fromkeys((line.data_set, line.model, line.mode) for line in lines):
        own = [line for line in lines if (line.data_set, line.model, line.mode) == name]
        found = [next(iter(line.scores.values())) for line in own]
        places = [line.gold_at for line in own]
        (drawn,) = axes.plot(places, [100 * i.mean for i in found], marker="o", label=name[2])
        low, high = [100 * i.low for i in found], [100 * i.high for i in found]
        axes.fill_between(places, low, high, alpha=0.15, color=drawn.get_color())
    axes.set_xlabel("place of the gold document")
    axes.legend()
