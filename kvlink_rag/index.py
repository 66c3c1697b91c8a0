"""Nearest passages by inner product: the only file that knows FAISS.

Exact search (a flat index) over rows of the catalog. The file is derived from the catalog and is
not FAISS's own: ids and vectors under one checksum (`sealed`), since FAISS does not notice a
flipped byte and was not made to read a hostile file. Knows ids and vectors, no texts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from . import files
from .errors import ConfigError, IndexCorrupt
from .sealed import Kind, read_sealed, write_sealed

KIND = Kind("kvlink-index", 1, IndexCorrupt)

Array = npt.NDArray[Any]


class VectorIndex:
    """Vectors of one dimension, each with an id of its own. Safe to share between threads."""

    def __init__(self, dimension: int) -> None:
        if dimension < 1:
            raise ConfigError(f"found dimension {dimension}, expected at least 1")
        self.dimension = dimension
        self._lock = threading.Lock()
        self._ids: set[int] = set()
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: int) -> bool:
        return id in self._ids

    @property
    def ids(self) -> set[int]:
        """All ids."""
        with self._lock:
            return set(self._ids)

    def add(self, ids: Array | Iterable[int], vectors: Array) -> None:
        """Add vectors (float32 [n, dimension], finite) under `ids` (int64 [n], unique).

        An id that is there is replaced. Raises `ConfigError` for any other arguments.
        """
        numbers, rows = _ids(ids), self._vectors(vectors)
        if len(numbers) != len(rows) or len(np.unique(numbers)) != len(numbers):
            raise ConfigError(
                f"found {len(np.unique(numbers))} different ids for {len(rows)} vectors, "
                "expected one id for each"
            )
        with self._lock:
            self._remove(numbers)
            if len(numbers):
                self._index.add_with_ids(rows, numbers)
                self._ids.update(numbers.tolist())

    def remove(self, ids: Array | Iterable[int]) -> int:
        """Remove `ids`; those that are not there are ignored. How many were there."""
        with self._lock:
            return self._remove(_ids(ids))

    def search(self, vector: Array, k: int) -> list[tuple[int, float]]:
        """The `k` ids of largest inner product with `vector` (float32 [dimension]), and these.

        Best first, equal ones by id; fewer where the index holds fewer.
        """
        query = self._vectors(np.asarray(vector)[None])
        with self._lock:
            scores, ids = self._nearest(query, min(k, len(self._ids)))
        order = np.lexsort((ids, -scores))[: max(k, 0)]
        return [(int(ids[i]), float(scores[i])) for i in order]

    def vectors(self, ids: Array | Iterable[int]) -> Array:
        """The vectors of `ids`, float32 [n, dimension], in order. Raises `ConfigError`."""
        numbers = _ids(ids)
        with self._lock:
            if missing := [id for id in numbers.tolist() if id not in self._ids]:
                raise ConfigError(f"found id {missing[0]}, expected one that the index holds")
            rows = [self._index.reconstruct(id) for id in numbers.tolist()]
        return np.stack(rows) if rows else np.empty((0, self.dimension), np.float32)

    def save(self, path: Path, version: int, *, source: str = "") -> None:
        """Write the index to `path`, whole or not at all.

        version: the catalog's version it stands for; source: which catalog. Not fsynced: after a
        power cut the checksum decides, and the index is made again. Raises `OSError`.
        """
        with self._lock:
            ids, vectors = self._contents()
        tensors = {"ids": torch.from_numpy(ids), "vectors": torch.from_numpy(vectors)}
        with files.replaced(path) as file:
            write_sealed(file, KIND, tensors, {"catalog_version": str(version), "source": source})

    @classmethod
    def load(
        cls, path: Path, *, dimension: int | None = None, source: str | None = None
    ) -> tuple[VectorIndex, int]:
        """The index at `path` and the catalog version it stands for.

        Raises `IndexCorrupt` where its bytes are not what was written, or its dimension or source
        are not the ones given; `FileNotFoundError` where there is none.
        """
        tensors, facts = read_sealed(path, KIND)
        ids, vectors, version = _checked(path, tensors, facts)
        found = (vectors.shape[1], facts.get("source"))
        expected = (found[0] if dimension is None else dimension, source or found[1])
        if found != expected:
            raise IndexCorrupt(
                f"{path}: found dimension and source {found}, expected {expected}; remove the "
                "file, it is made again"
            )
        index = cls(vectors.shape[1])
        index.add(ids, vectors)
        return index, version

    def _remove(self, ids: Array) -> int:
        known = [id for id in ids.tolist() if id in self._ids]
        if known:
            self._index.remove_ids(np.array(known, dtype=np.int64))  # type: ignore[arg-type]
            self._ids.difference_update(known)
        return len(known)

    def _nearest(self, query: Array, k: int) -> tuple[Array, Array]:
        """At least the k best, and all that tie with the last of them."""
        ask = k
        while True:
            if ask <= 0:
                return np.empty(0, np.float32), np.empty(0, np.int64)
            scores, ids = self._index.search(query, ask)
            if ask >= len(self._ids) or scores[0, ask - 1] < scores[0, k - 1]:
                return scores[0], ids[0]
            ask = min(2 * ask + 1, len(self._ids))

    def _contents(self) -> tuple[Array, Array]:
        """ids int64 [n], vectors float32 [n, dimension], in the index's order."""
        ids = faiss.vector_to_array(self._index.id_map).astype(np.int64)
        flat = faiss.downcast_index(self._index.index)
        count = len(ids)
        vectors = flat.reconstruct_n(0, count) if count else np.empty((0, self.dimension), "f4")
        return ids, vectors.astype(np.float32, copy=False)

    def _vectors(self, vectors: Array) -> Array:
        """Validated: float32 [n, dimension], contiguous, finite."""
        rows = np.asarray(vectors)
        if rows.ndim != 2 or rows.shape[1] != self.dimension or rows.dtype != np.float32:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise ConfigError(f"found vectors {found}, expected float32 [n, {self.dimension}]")
        if not np.isfinite(rows).all():
            raise ConfigError("found a vector that is not finite; embed its text again")
        return np.ascontiguousarray(rows)


def _ids(ids: Array | Iterable[int]) -> Array:
    numbers = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
        raise ConfigError(f"found ids {numbers.dtype} {list(numbers.shape)}, expected int64 [n]")
    return np.ascontiguousarray(numbers, dtype=np.int64)


def _checked(
    path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str]
) -> tuple[Array, Array, int]:
    """ids, vectors and version, as an index has them."""
    shapes = {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}
    ids, vectors = tensors.get("ids"), tensors.get("vectors")
    version = facts.get("catalog_version", "")
    if (
        list(tensors) != ["ids", "vectors"]
        or ids is None
        or vectors is None
        or ids.dtype != torch.int64
        or vectors.dtype != torch.float32
        or list(vectors.shape) != [len(ids), *vectors.shape[1:]]
        or vectors.dim() != 2
        or not vectors.shape[1]
        or len(np.unique(ids.numpy())) != len(ids)
        or not bool(vectors.isfinite().all())
        or not (version.isascii() and version.isdecimal() and len(version) < 20)
    ):
        raise IndexCorrupt(
            f"{path}: found {shapes} of version {version!r}, expected unique ids int64 [n] and "
            "finite vectors float32 [n, dimension]"
        )
    return ids.numpy(), vectors.numpy(), int(version)
