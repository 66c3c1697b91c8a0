"""The end of a document: what was derived from it goes first, the catalog's row last.

    index file → snapshots that no other document shares → catalog → vector index

A kill on the way leaves a document that lacks something, which can be made again, never something
that outlives its document. What erasure means stands in `docs/security.md`. Knows the parts of a
collection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .catalog import Entry
from .parts import Parts
from .passages import remove_unused
from .reencoding import unused


def erase(parts: Parts, ids: Sequence[str], *, now: bool = False) -> int:
    """Delete documents and everything derived from them; how many there were.

    now: also what the catalog knows nothing of (snapshots of no document), the catalog's log and
    its free pages, which takes time with the collection's size. Raises `CatalogError` where another
    process reads the log for so long that it cannot be emptied.
    """
    entries = parts.catalog.get(ids, skip_damaged=True)
    # 1. index file: it is made again from the catalog
    parts.index.forget_file()
    # 2. snapshots
    for key in _only_theirs(parts, entries):
        parts.forget(key)
    # 3. catalog
    gone = parts.catalog.delete(ids)
    # 4. vector index; a question may have encoded one of them again meanwhile
    parts.index.current()
    remove_unused(parts, gone)
    if now:
        for key in unused(parts):
            parts.forget(key)
        parts.catalog.purge()
        parts.index.save()
    return len(gone)


def _only_theirs(parts: Parts, entries: Sequence[Entry]) -> list[str]:
    """Keys of snapshots that no document but these uses."""
    users = Counter(entry.snapshot_key for entry in entries)
    return [
        key
        for key, count in users.items()
        if key is not None and parts.catalog.snapshot_users(key) <= count
    ]
