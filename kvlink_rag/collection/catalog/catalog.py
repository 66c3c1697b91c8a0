"""`Catalog`: what the other parts of a collection ask of it and change in it.

The index and the snapshots are derived from it. Knows rows and versions; knows neither what an
embedding means nor where snapshots lie. The schema stands in `docs/formats.md`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import reading, writing
from .checking import check
from .connection import Database, opening
from .records import Array, Changes, Entry, Record, Upserted, entries
from .schema import prepare


class Catalog:
    """Open it with `Catalog.open`. For any number of threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = Database(path)
        self.identity = reading.identity(self._database)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        siblings: Sequence[str] = (),
    ) -> Catalog:
        """Open the catalog at `path`; with `create`, make it where there is none.

        siblings: names beside `path` that exist only where a catalog was: if the catalog is
        missing or empty and one of them is there, it was lost, and is not silently made anew.
        Raises `CatalogError` where it is missing, lost, damaged, of another schema version or
        cannot be opened.
        """
        path = Path(os.path.realpath(path))
        with opening(path):
            prepare(path, create=create, siblings=siblings)
            return cls(path)

    def upsert(self, records: Sequence[Record]) -> Upserted:
        """Write `records` in one transaction; on the disk when this returns.

        Content that is stored already is not touched, except that an embedding it lacked is
        added. A replaced document keeps its row and loses the snapshot key unless the record
        brings one; likewise the embedding, unless title and text stay the same. Of records with
        one id the last counts. Raises `DocumentError` for text that is not valid Unicode, metadata
        that is not JSON or a bad embedding.
        """
        return writing.upsert(self._database, records)

    def delete(self, ids: Iterable[str]) -> list[Entry]:
        """Delete documents in one transaction; what was there. Unknown ids are left out."""
        return writing.delete(self._database, ids)

    def get(self, ids: Iterable[str], *, skip_damaged: bool = False) -> list[Entry]:
        """The entries of `ids`, in that order; unknown ids are left out.

        Raises `CatalogError` for one that is damaged, unless `skip_damaged` leaves those out too.
        """
        return reading.by_ids(self._database, ids, skip_damaged)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that the catalog does not hold; a damaged document is held."""
        return reading.missing(self._database, ids)

    def by_rows(self, rows: Iterable[int]) -> list[Entry]:
        """The entries of `rows`, in that order; rows that are gone are left out."""
        return reading.by_rows(self._database, rows)

    def iterate(self, batch: int = 1000, *, skip_damaged: bool = False) -> Iterator[Entry]:
        """All entries by row, read `batch` at a time; changes meanwhile may be seen or not.

        Raises `CatalogError` for one that is damaged, unless `skip_damaged` leaves those out.
        """
        for row in reading.every_row(self._database, batch=batch):
            yield from entries([row], skip_damaged)

    def snapshots(self) -> list[tuple[str | None, int | None]]:
        """Snapshot key and tokens of every document, damaged ones too."""
        return reading.snapshots(self._database)

    def users(self, key: str) -> list[str]:
        """The ids of the documents that use the snapshot `key`."""
        return reading.users(self._database, key)

    def count(self) -> int:
        """How many documents there are."""
        return reading.count(self._database)

    def embedded(self) -> int:
        """How many documents have an embedding: the size of an index that is up to date."""
        return reading.embedded(self._database)

    def without_embedding(self) -> set[int]:
        """The rows of documents that have none."""
        return reading.without_embedding(self._database)

    def version(self) -> int:
        """The number of the last change to documents or embeddings, by any process (cheap)."""
        return reading.version(self._database)

    def has_had(self, version: int) -> bool:
        """Whether this catalog was ever at `version`; False also where no row tells any more.

        Numbers are not used again by another history (see `writing`), so an index that was saved
        before a backup was brought back is told from one that this catalog led to.
        """
        return reading.has_had(self._database, version)

    def index_version(self) -> int | None:
        """The version of the index that was saved last; None where none ever was."""
        return reading.index_version(self._database)

    def remember_index(self, version: int) -> None:
        """Note, before it is saved, an index of `version`, if this catalog was ever at it.

        The rows that tell so may all be replaced later.
        """
        if self.has_had(version):
            self.set_setting(reading.INDEX_VERSION, version)

    def forget_index(self) -> None:
        """Note that no index is saved."""
        self.set_setting(reading.INDEX_VERSION, None)

    def purge(self) -> None:
        """Empty the log and the free pages of what was deleted; takes time with the size.

        Raises `CatalogError` where another process reads the log for too long.
        """
        self._database.purge()

    def changes_since(self, version: int) -> Changes:
        """What changed after `version` (0: everything), up to one consistent point.

        Raises `CatalogError` where an embedding's bytes are not what was written.
        """
        return reading.changes_since(self._database, version)

    def changed_rows(self, version: int) -> tuple[int, list[int]]:
        """The version now, and every row written or deleted after `version` (0: all rows)."""
        return reading.changed_rows(self._database, version)

    def texts(self, rows: Iterable[int]) -> Iterator[tuple[int, str, str, str]]:
        """Row, id, title and text of those `rows` that are there; contents are not verified."""
        return reading.texts(self._database, rows)

    def snapshot_users(self, key: str) -> int:
        """How many documents use the snapshot `key`."""
        return reading.count_users(self._database, key)

    def set_snapshots(self, items: Iterable[tuple[Entry, str | None, int | None]]) -> int:
        """Set snapshot key and tokens of entries, in one transaction; how many were set.

        An entry whose content was replaced or deleted meanwhile is left alone. The catalog's
        version stays: the index does not depend on this.
        """
        return writing.set_snapshots(self._database, items)

    def set_embeddings(self, items: Iterable[tuple[Entry, Array | None]]) -> int:
        """Set or drop (None) embeddings of entries, in one transaction; how many were set.

        An entry whose content was replaced or deleted meanwhile is left alone.
        """
        return writing.set_embeddings(self._database, items)

    def settings(self) -> dict[str, Any]:
        """All settings."""
        return reading.settings(self._database)

    def set_settings(self, values: Mapping[str, Any]) -> None:
        """Set settings (JSON values) in one transaction; those not named stay."""
        writing.set_settings(self._database, values)

    def set_first(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set those of `values` that are not set yet, in one transaction; all settings then."""
        writing.set_settings(self._database, values, replace=False)
        return self.settings()

    def set_setting(self, key: str, value: Any) -> None:
        """Set one setting (a JSON value)."""
        self.set_settings({key: value})

    def check(self, fix: bool = False) -> list[str]:
        """What is wrong, one line each; reads everything.

        `fix` rebuilds SQLite's indexes and drops embeddings that are not what was written (they
        can be made again: `Changes.removed` tells the index). Damaged text stays reported: it is
        the truth, and only adding the document again mends it.
        """
        return check(self._database, fix)

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._database.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
