"""The tables of a catalog: how they are made, and that a file has these and no others.

A catalog appears whole or not at all, and one that was lost is not made anew. Knows no document.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from kvlink_rag.disk import atomic_files
from kvlink_rag.errors import CatalogError

from .connection import Sql, connect, read_once

VERSION = 1
APPLICATION_ID = 0x4B564C4B  # "KVLK"
_STATEMENTS = (
    """CREATE TABLE documents (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        title TEXT NOT NULL,
        text TEXT NOT NULL,
        metadata TEXT NOT NULL,
        content_hash TEXT NOT NULL,
        snapshot_key TEXT,
        tokens INTEGER,
        embedding BLOB,
        version INTEGER NOT NULL
    )""",
    "CREATE INDEX documents_version ON documents (version)",
    "CREATE INDEX documents_snapshot ON documents (snapshot_key) WHERE snapshot_key IS NOT NULL",
    "CREATE TABLE tombstones (row INTEGER PRIMARY KEY, version INTEGER NOT NULL)",
    "CREATE INDEX tombstones_version ON tombstones (version)",
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE state (identity TEXT NOT NULL, version INTEGER NOT NULL)",
)


def prepare(path: Path, *, create: bool, siblings: Sequence[str]) -> None:
    """Have a catalog of this version at `path`; with `create`, make it where there was none.

    siblings: names beside `path` that exist only where a catalog was. Raises `CatalogError` where
    it is missing, lost, or its tables are not those of a catalog.
    """
    beside = (*siblings, f"{path.name}-wal")
    lost = [f"{name} beside it" for name in beside if (path.parent / name).exists()]
    if not atomic_files.is_read_only(path.parent):
        _sweep(path)
    if not path.exists() or path.stat().st_size == 0:
        _refuse_lost(path, create, lost)
        _create(path)
    _check(path)


def _sweep(path: Path) -> None:
    """Remove what creations that were killed left beside `path`."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        if path.exists() and leftover.exists() and path.samefile(leftover):
            leftover.unlink(missing_ok=True)  # unopened: see `opening`
    for leftover in atomic_files.abandoned(path.parent, path.name):
        leftover.unlink(missing_ok=True)


def _refuse_lost(path: Path, create: bool, lost: Sequence[str]) -> None:
    """Raise unless a catalog may be made at `path`: none was there before."""
    if path.exists():
        lost = [f"an empty {path.name}", *lost]
    if lost:
        raise CatalogError(
            f"found no catalog at {path}, but {', '.join(lost)}, so it was lost; bring the file "
            "back from a backup, or remove the directory and index again"
        )
    if not create:
        raise CatalogError(f"found no catalog at {path}; check the path, or create one")


def _create(path: Path) -> None:
    """Make an empty catalog appear at `path`, whole, unless another process was faster."""
    with atomic_files.temporary(path.parent, path.name) as file:
        _write(Path(file.name))
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            atomic_files.link(Path(file.name), path)
    atomic_files.sync_directory(path.parent)


def _write(path: Path) -> None:
    """Fill the empty file at `path`, without a journal beside it."""
    with contextlib.closing(connect(path, "journal_mode=MEMORY")) as sql:
        sql.execute("BEGIN")
        for statement in _STATEMENTS:
            sql.execute(statement)
        sql.execute("INSERT INTO state VALUES (?, 0)", (uuid.uuid4().hex,))
        sql.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        sql.execute(f"PRAGMA user_version = {VERSION}")
        sql.execute("COMMIT")


def _check(path: Path) -> None:
    """Raise `CatalogError` unless the database is a catalog of this version, unaltered."""
    application, version, found = read_once(path, _facts)
    if application != APPLICATION_ID:
        raise CatalogError(f"{path} is not a catalog: found application id {application:#x}")
    if version != VERSION:
        raise CatalogError(
            f"{path} has schema version {version}, expected {VERSION}; open it with the "
            "release that wrote it, or index again into a new directory"
        )
    if found != set(_STATEMENTS):
        raise CatalogError(f"{path} is damaged: its tables are not those of a catalog")


def _facts(sql: Sql) -> tuple[int, int, set[str]]:
    """Application id, schema version, and the statements that made the tables."""
    (application,) = sql.execute("PRAGMA application_id").fetchone()
    (version,) = sql.execute("PRAGMA user_version").fetchone()
    names = "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    return application, version, {text for (text,) in sql.execute(names)}
