"""Finding and mending what is wrong in a collection.

Everything derived (index, snapshots) can be made again from the catalog. Knows the parts of a
collection; each part checks its own files.
"""

from __future__ import annotations

import math

from kvlink_rag.errors import CatalogError

from .adding import BATCH
from .parts import Parts
from .passages import batched, has_snapshot, room
from .proving import sampled, wrongly_encoded
from .reencoding import embed_again, encode_again, unused


def check(parts: Parts, fix: bool, sample: int | None = 0) -> list[str]:
    """What is wrong, one line each; with `fix`, mend all that can be made again.

    sample: how many snapshots (None: all) are compared with what the model encodes now.
    """
    problems: list[str] = []
    try:
        problems += (f"catalog: {problem}" for problem in _check_catalog(parts, fix))
        problems += _check_index(parts, fix)
        problems += (f"snapshots: {problem}" for problem in parts.store.check(fix))
        problems += _check_unused(parts, fix)
        problems += _check_missing(parts, fix)
        problems += _check_encoded(parts, fix, sample)
    except CatalogError as error:
        if not problems:
            raise
        problems.append(f"catalog: the check ends here: {error}")
    return problems


def _check_catalog(parts: Parts, fix: bool) -> list[str]:
    """The catalog itself; embeddings that it drops as damaged are made again."""
    before = parts.catalog.without_embedding()
    problems = parts.catalog.check(fix)
    if dropped := parts.catalog.without_embedding() - before:
        embed_again(parts, parts.catalog.by_rows(dropped))
    return problems


def _check_index(parts: Parts, fix: bool) -> list[str]:
    """The index file against its own digest, the index against the catalog."""
    problems = list(dict.fromkeys(parts.index.check()))
    if problems and fix:
        parts.index.reset()
    return [f"index: {problem}" for problem in problems]


def _check_unused(parts: Parts, fix: bool) -> list[str]:
    """Snapshots that no document uses."""
    keys = unused(parts)
    for key in keys if fix else ():
        parts.forget(key)
    return [f"snapshots: {key} belongs to no document" for key in keys]


def _check_missing(parts: Parts, fix: bool) -> list[str]:
    """Documents without a snapshot that there is room for; over the budget none is missed."""
    if parts.store.size_limit is not None:
        return []
    seen = parts.store.stats()
    left, each = room(parts), seen.bytes / seen.count if seen.count else 0.0
    problems = []
    for entries in batched(parts.catalog.iterate(skip_damaged=True), BATCH):
        lost = [entry for entry in entries if not has_snapshot(parts, entry)]
        lost = lost[: len(lost) if each == 0 or left == math.inf else max(0, int(left // each))]
        left -= each * len(lost)
        problems += [f"snapshots: document {entry.id!r} has none" for entry in lost]
        if lost and fix:
            encode_again(parts, lost)
    return problems


def _check_encoded(parts: Parts, fix: bool, sample: int | None) -> list[str]:
    """Snapshots that are not what the model encodes: other weights made them."""
    problems = []
    for entries in sampled(parts, sample):
        _, wrong = wrongly_encoded(parts, entries)
        problems += [
            f"snapshots: that of document {entry.id!r} is not what the model encodes"
            for entry in wrong
        ]
        if wrong and fix:
            for key in {str(entry.snapshot_key) for entry in wrong}:
                parts.forget(key)
            encode_again(parts, wrong)
    return problems
