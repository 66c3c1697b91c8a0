"""The vector index of a collection, kept up to date with the catalog, and its file.

Knows versions, rows and vectors; knows no model, no embedder and no question. The index is derived:
whatever is wrong with it, it is made again from the catalog.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from kvlink_rag.arguments import check_search
from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.forks import ForkSafeLock, undivided
from kvlink_rag.documents import Hit
from kvlink_rag.errors import CatalogError, IndexCorrupt, StorageError
from kvlink_rag.retrieval.embedder import Vectors
from kvlink_rag.retrieval.rounds import Where
from kvlink_rag.retrieval.vector_index import VectorIndex

from .catalog import Catalog

logger = logging.getLogger(__name__)


class SearchIndex:
    """The index over a catalog. For any number of threads; other processes may change the catalog.

    path: of its file, which is read when the index is first needed.
    """

    def __init__(self, path: Path, catalog: Catalog) -> None:
        self.path, self._catalog = path, catalog
        self._lock = ForkSafeLock()  # of the four below
        self._index: VectorIndex | None = None
        self._version = self._saved = 0

    def current(self) -> VectorIndex:
        """The index, brought up to the catalog's version, whoever changed it."""
        with undivided(), self._lock:
            dimension = self._dimension()
            if self._index is None or self._index.dimension != dimension:
                self._index, self._version = self._load(dimension)
                self._saved = self._version
            if self._version != self._catalog.version():
                changes = self._catalog.changes_since(self._version)
                if len(changes.rows) and changes.vectors.shape[1] != self._index.dimension:
                    # another process added the first vectors since the dimension was read
                    self._index = VectorIndex(changes.vectors.shape[1], self._search())
                    changes = self._catalog.changes_since(0)
                self._index.remove(changes.removed)
                if len(changes.rows):
                    self._index.add(changes.rows, changes.vectors)
                self._version = changes.version
            return self._index

    def nearest(self, vector: Vectors, k: int, where: Where | None) -> list[Hit]:
        """The best `k` hits for `vector` that `where` takes; asks for more until there are `k`."""
        index, ask = self.current(), k
        hits: list[Hit] = []
        seen: set[int] = set()
        while True:
            found = index.search(vector, ask)
            fresh = [(row, score) for row, score in found if row not in seen]
            entries = {entry.row: entry for entry in self._catalog.by_rows(row for row, _ in fresh)}
            here = [Hit(entries[row].document, score) for row, score in fresh if row in entries]
            hits += [hit for hit in here if where is None or where(hit.document)]
            if len(hits) >= k or len(found) < ask:
                return hits[:k]
            seen.update(row for row, _ in fresh)
            ask *= 4

    def save(self) -> None:
        """Write the file. A failure is logged: the file is made again from the catalog."""
        try:
            with undivided(), self._lock:
                index = self.current()
                if "dimension" not in self._catalog.settings():
                    return  # nothing was ever embedded
                self._catalog.remember_index(self._version)
                index.save(self.path, self._version, source=self._catalog.identity)
                self._saved = self._version
        except OSError as error:
            logger.warning("the index is not saved and will be rebuilt: %s", error)

    def close(self) -> None:
        """Save what changed since the file was written; nothing where the directory is gone."""
        with undivided(), self._lock:
            changed = self._index is not None and self._version != self._saved
            if changed and os.path.isdir(self.path.parent):
                self.save()

    def forget_file(self) -> None:
        """Remove the file, as what it holds is about to be erased; it is made again when saved.

        Raises `StorageError` where it cannot be removed.
        """
        with undivided(), self._lock:
            if self._catalog.index_version() is not None:
                self._catalog.forget_index()
            self._saved = -1
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{self.path} cannot be removed ({error}), and still holds the vectors of what "
                    "is replaced or deleted; do it again once the directory can be written"
                ) from error

    def reset(self) -> None:
        """Make the index anew from the catalog, and its file."""
        with undivided(), self._lock:
            self._index, self._version = VectorIndex(self._dimension(), self._search()), 0
            self._saved = -1
            self.save()

    def check(self) -> list[str]:
        """What is wrong with the index and its file; one never saved is made when needed."""
        leftovers = atomic_files.abandoned(self.path.parent, self.path.name)
        problems = [f"leftover temporary file: {leftover.name}" for leftover in leftovers]
        lost = False
        try:
            saved, version = VectorIndex.load(self.path, source=self._catalog.identity)
            if version == self._catalog.version():
                problems += self._differences(saved)
        except FileNotFoundError:
            lost = True
            if self._catalog.index_version() is not None:
                problems.append(f"missing file: {self.path.name}")
        except (IndexCorrupt, OSError) as error:
            lost = True
            problems.append(str(error))
        # one that would only now be made from the catalog cannot differ from it
        return problems if lost and self._index is None else problems + self._differences()

    def _differences(self, index: VectorIndex | None = None) -> list[str]:
        """Whether `index` (None: the one in use) holds other vectors than the catalog."""
        try:
            index = self.current() if index is None else index
            expected = self._catalog.changes_since(0)
        except CatalogError:
            return []  # a damaged embedding, which `Catalog.check` has told
        if set(expected.rows.tolist()) != index.ids:
            return [f"found {len(index)} vectors, expected those of {len(expected.rows)} documents"]
        same = np.array_equal(index.vectors(expected.rows), expected.vectors)
        return [] if same or not len(index) else ["found other vectors than the catalog's"]

    def _load(self, dimension: int) -> tuple[VectorIndex, int]:
        """The saved index, or an empty one at version 0, which the catalog then fills."""
        try:
            index, version = VectorIndex.load(
                self.path,
                dimension=dimension,
                source=self._catalog.identity,
                search=self._search(),
            )
            if self._catalog.has_had(version):
                return index, version
            logger.warning(
                "the index was saved at a state that the catalog cannot confirm (its last "
                "documents changed since, or a backup was brought back) and is rebuilt"
            )
        except FileNotFoundError:
            pass
        except (IndexCorrupt, OSError) as error:
            logger.warning("the index is rebuilt from the catalog: %s", error)
        return VectorIndex(dimension, self._search()), 0

    def _dimension(self) -> int:
        """Numbers in a vector; any number will do for an index as long as there are none."""
        return int(self._catalog.settings().get("dimension") or 1)

    def _search(self) -> str:
        """How the nearest passages are found."""
        return check_search(str(self._catalog.settings().get("search", "auto")))
