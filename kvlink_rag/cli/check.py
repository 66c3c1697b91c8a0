"""`kvlink-rag check`: find lost or damaged files, and mend them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from kvlink_rag.quantities import number

from . import terminal
from .opening import OPTIONS, Options, collection
from .values import Sample

_NAME = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{32,}\b|\b\d+\b")  # what differs within a kind
SHOWN = 3  # problems of one kind that are shown one by one


def check(*, fix: bool = False, sample: Sample = 0, options: Options = OPTIONS) -> int:
    """Find lost or damaged files.

    Compares catalog, index and snapshots. Exit code 1: problems are left.

    Args:
        fix: mend what can be made again
        sample: so many snapshots, or all, are compared with what the model encodes now
    """
    with collection(options) as rag, terminal.doing("checking"):
        problems = rag.check(fix=fix, sample=sample)
        left = rag.check(sample=sample) if fix and problems else problems
    if not problems:
        terminal.show(["no problems"])
        return 0
    terminal.show(summarised(problems))
    if fix:
        terminal.show([f"{number(len(problems), 'problem')} found, {len(left)} left"])
        terminal.show(summarised(left))
    else:
        terminal.note("what is not the catalog's is made again with: kvlink-rag check --fix")
    return 1 if left else 0


def summarised(problems: Iterable[str]) -> Iterator[str]:
    """A line for each problem; one line for all of a kind where there are more than `SHOWN`.

    Of one kind are those that differ in numbers and names only.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        kinds[_NAME.sub("…", problem)].append(problem)
    for kind in kinds.values():
        if len(kind) > SHOWN:
            yield f"{kind[0]} (and {len(kind) - 1:,} more like it)"
        else:
            yield from kind
