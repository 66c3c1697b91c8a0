"""What `check` looks at in a store, step by step, and what killed writers left in it.

Knows the table's rows and the files they should name; knows no counts and no limit.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvlink_rag.disk import atomic_files
from kvlink_rag.errors import SnapshotCorrupt
from kvlink_rag.snapshots.file_format import read_snapshot

from .keys import Refused, is_key, key_in, locate
from .table import DATABASE, FILE_MODE, OWN_FILES, Rows, Table

_LOCKING_SECONDS = 0.2


def check(table: Table, temporary: Path, fix: bool) -> Iterator[str]:
    """What is wrong in the table's directory, one line each; reads every file. `fix` mends it all.

    temporary: the folder of files being written. Raises `OSError` where something cannot be read.
    """
    yield from _check_table(table, fix)
    yield from _check_rows(table, fix)
    yield from _check_leftovers(table, temporary, fix)
    yield from _check_unknown(table, temporary, fix)
    yield from _check_totals(table, fix)


def sweep(table: Table, temporary: Path) -> None:
    """Remove what dead writers left: their temporary file, and its link without a row."""
    if table.frozen:
        return
    for leftover in atomic_files.abandoned(temporary):
        file = atomic_files.temporary_for(leftover) or ""
        if key_in(name := f"{file[:2]}/{file}") is not None:
            table.change(partial(_unlink_unless_known, name=name))
        leftover.unlink(missing_ok=True)


def _unlink_unless_known(rows: Rows, name: str) -> None:
    if not rows.has(name):
        rows.unlink(name)


def _check_table(table: Table, fix: bool) -> Iterator[str]:
    found = table.query("PRAGMA integrity_check")
    if found != [("ok",)]:
        yield f"the table {DATABASE} is damaged: {found[0][0]}"
        if fix:
            table.rebuild()


def _check_rows(table: Table, fix: bool) -> Iterator[str]:
    statement = "SELECT rowid, key, raw, mode, size, filename, value FROM Cache"
    for rowid, *row in table.query(statement):
        problem = _row_problem(table.directory, *row)
        if problem is not None and _settled_row(table, statement, rowid) == [(rowid, *row)]:
            yield problem
            if fix:
                table.change(partial(Rows.remove, rowid=rowid, name=row[4]))


def _settled_row(table: Table, statement: str, rowid: int) -> list[tuple[Any, ...]]:
    """The row once no writer is in the middle of a change: one unlinks before it deletes."""
    again = f"{statement} WHERE rowid = ?"
    if table.frozen:
        return table.query(again, rowid)
    return table.change(lambda rows: rows.sql(again, rowid))


def _row_problem(
    directory: Path,
    key: object,
    raw: object,
    mode: object,
    size: object,
    name: object,
    value: object,
) -> str | None:
    """What is wrong with one row and its file, if anything."""
    if not is_key(key) or raw != 1 or mode != FILE_MODE or value is not None:
        return f"a row of another kind: key {str(key)[:64]!r}, mode {mode!r}, file {name!r}"
    try:
        path = locate(directory, name)
        if path.lstat().st_size != size:
            return f"wrong size: {name} has {path.lstat().st_size} bytes, its row says {size}"
        read_snapshot(path, key=str(key))
    except Refused as error:
        return f"refused row {key}: {error}"
    except FileNotFoundError:
        return f"missing file: {name}"
    except SnapshotCorrupt as error:
        return f"corrupt file: {error}"
    except OSError as error:
        if error.errno != errno.EIO:
            raise  # its surroundings: too many open files, no permission
        return f"unreadable file: {error}"
    return None


def _check_leftovers(table: Table, temporary: Path, fix: bool) -> Iterator[str]:
    found = set(atomic_files.abandoned(temporary))
    if found:
        time.sleep(_LOCKING_SECONDS)  # a living writer locks its file right after making it
        found &= set(atomic_files.abandoned(temporary))
    for leftover in sorted(found):
        yield f"leftover temporary file: {leftover.name}"
    if fix:
        sweep(table, temporary)


def _check_unknown(table: Table, temporary: Path, fix: bool) -> Iterator[str]:
    known = {name for (name,) in table.query("SELECT filename FROM Cache")}
    for name in _names(table.directory, temporary):
        if name in known or table.change(partial(Rows.has, name=name)):
            continue
        if not os.path.lexists(table.directory / name):
            continue  # evicted since it was listed
        yield f"unknown file: {os.fsencode(name).decode(errors='backslashreplace')}"
        if fix:
            table.change(partial(_adopt_or_remove, name=name))


def _names(directory: Path, temporary: Path) -> Iterator[str]:
    """Everything in the store that is not a directory of ours, its table or a temporary file."""
    for root, directories, names in os.walk(directory, topdown=False):
        links = [name for name in directories if os.path.islink(os.path.join(root, name))]
        for name in sorted(names + links):
            path = Path(root, name)
            relative = path.relative_to(directory).as_posix()
            is_temporary = path.parent == temporary and atomic_files.temporary_for(path)
            if relative not in OWN_FILES and not is_temporary:
                yield relative


def _adopt_or_remove(rows: Rows, name: str) -> None:
    """Give a sound snapshot file its row back; remove anything else."""
    path, key = rows.directory / name, key_in(name)
    try:
        if key is None or rows.path(key) is not None:
            raise Refused("not a snapshot that lacks a row")
        read_snapshot(locate(rows.directory, name), key=key)
        rows.adopt(name, path.lstat().st_size)
    except OSError:
        path.unlink(missing_ok=True)


def _check_totals(table: Table, fix: bool) -> Iterator[str]:
    for name, actual in (("count", "COUNT(*)"), ("size", "COALESCE(SUM(size), 0)")):
        table.total(name)  # a table without one is rebuilt
        kept = "SELECT value FROM Settings WHERE key = ?"
        # one statement, so one moment: a writer may be at work
        both = table.query(f"SELECT ({kept}), (SELECT {actual} FROM Cache)", name)
        for found, expected in both:
            if found != expected:
                yield f"wrong total: {name} is {found}, expected {expected}"
                if fix:
                    table.change(_recount)


def _recount(rows: Rows) -> None:
    rows.sql("UPDATE Settings SET value = (SELECT COUNT(*) FROM Cache) WHERE key = 'count'")
    rows.sql(
        "UPDATE Settings SET value = (SELECT COALESCE(SUM(size), 0) FROM Cache) WHERE key = 'size'"
    )
