"""Which snapshots go where there are too many bytes: the least recently used. Reads no snapshot.

Recency is the file's mtime, set at each read (one system call, no transaction); a row's
`access_time` is its lower bound. Eviction looks at the oldest row and, where the file's time is
later, moves the row there instead: least recently used, paid for by evictions only.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .keys import locate
from .table import Rows

_OLDEST = (
    "SELECT rowid, filename, CAST(COALESCE(access_time, 0) AS REAL) FROM Cache"
    " ORDER BY access_time LIMIT 1"
)
_CLOCK_STEP = 1e-3  # seconds by which a file's time may differ from its row's and be the same


def touch(path: Path) -> None:
    """Note that the file was used; a store that may not be written keeps no recency."""
    with contextlib.suppress(OSError):
        os.utime(path, follow_symlinks=False)


def evict(rows: Rows, limit: int | None) -> int:
    """Remove the least recently used until at most `limit` bytes stay; how many went.

    Within a transaction. Each row moves at most once, to the time its file was last read.
    """
    evicted = 0
    while limit is not None and rows.total("size") > limit:
        oldest = rows.sql(_OLDEST)
        if not oldest:
            break
        rowid, name, time = oldest[0]
        used = _last_use(rows.directory, name)
        if used > time + _CLOCK_STEP:
            rows.sql("UPDATE Cache SET access_time = ? WHERE rowid = ?", used, rowid)
            continue
        rows.remove(rowid, name)
        evicted += 1
    return evicted


def _last_use(directory: Path, name: object) -> float:
    try:
        return locate(directory, name).lstat().st_mtime
    except OSError:
        return 0.0
