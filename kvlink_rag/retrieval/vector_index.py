"""Nearest passages by inner product: the only file that knows FAISS.

Over rows of the catalog: exact search, or from some size on search in the lists of the nearest
centroids (an inverted file, IVF), which finds nearly all of the nearest much sooner. The file is
derived from the catalog and is not FAISS's own: ids and vectors under one checksum (`sealed`),
since FAISS does not notice a flipped byte and was not made to read a hostile file. Knows ids and
vectors, no texts.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from kvlink_rag.arguments import check_search
from kvlink_rag.disk import atomic_files
from kvlink_rag.disk.checked_file import Kind, read_sealed, write_sealed
from kvlink_rag.errors import ConfigError, IndexCorrupt

logger = logging.getLogger(__name__)

KIND = Kind("kvlink-index", 1, IndexCorrupt)
LARGE = 128 << 20  # bytes of vectors; reading all of them takes about 10 ms on one core
LEAST = 1000  # vectors that lists are made of at least
GROWTH = 4  # lists are made anew when they hold so many times what they were made of

Array = npt.NDArray[Any]


class VectorIndex:
    """Vectors of one dimension, each with an id of its own. Safe to share between threads.

    search: "exact"; "ivf" for lists (from 1,000 vectors on); "auto" for lists from 128 MiB of
    vectors on, that is 43,690 of 768 numbers. Raises `ConfigError` for others.
    """

    def __init__(self, dimension: int, search: str = "auto") -> None:
        if dimension < 1:
            raise ConfigError(f"found dimension {dimension}, expected at least 1")
        self.dimension, self._wanted = dimension, check_search(search)
        self._lock = threading.Lock()
        self._ids: set[int] = set()
        self._held: _Exact | _Lists = _Exact(dimension)

    @property
    def is_exact(self) -> bool:
        """Whether every search sees every vector."""
        return isinstance(self._held, _Exact)

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
                self._held.add(numbers, rows)
                self._ids.update(numbers.tolist())
            self._settle()

    def remove(self, ids: Array | Iterable[int]) -> int:
        """Remove `ids`; those that are not there are ignored. How many were there."""
        with self._lock:
            return self._remove(_ids(ids))

    def search(self, vector: Array, k: int) -> list[tuple[int, float]]:
        """The `k` ids of largest inner product with `vector` (float32 [dimension]), and these.

        Best first, equal ones by id; fewer where the index holds fewer. Where it is not exact, one
        of the nearest may be missing, never its score wrong.
        """
        query = self._vectors(np.asarray(vector)[None])
        with self._lock:
            scores, ids = self._nearest(query, min(int(k), len(self._ids)))
        order = np.lexsort((ids, -scores))[: max(k, 0)]
        return [(int(ids[i]), float(scores[i])) for i in order]

    def vectors(self, ids: Array | Iterable[int]) -> Array:
        """The vectors of `ids`, float32 [n, dimension], in order. Raises `ConfigError`."""
        numbers = _ids(ids)
        with self._lock:
            if missing := [id for id in numbers.tolist() if id not in self._ids]:
                raise ConfigError(f"found id {missing[0]}, expected one that the index holds")
            return self._held.vectors(numbers)

    def save(self, path: Path, version: int, *, source: str = "") -> None:
        """Write the index to `path`, whole or not at all.

        version: the catalog's version it stands for; source: which catalog. Not fsynced: after a
        power cut the checksum decides, and the index is made again. Raises `OSError`.
        """
        with self._lock:
            tensors = {n: torch.from_numpy(array) for n, array in self._held.contents().items()}
        with atomic_files.replaced(path) as file:
            write_sealed(file, KIND, tensors, {"catalog_version": str(version), "source": source})

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dimension: int | None = None,
        source: str | None = None,
        search: str = "auto",
    ) -> tuple[VectorIndex, int]:
        """The index at `path` and the catalog version it stands for.

        Lists in the file are taken as they are, unless `search` is "exact".
        Raises `IndexCorrupt` where its bytes are not what was written, or its dimension or source
        are not the ones given; `FileNotFoundError` where there is none.
        """
        tensors, facts = read_sealed(path, KIND)
        arrays, version = _checked(path, tensors, facts)
        ids, vectors = arrays["ids"], arrays["vectors"]
        found = (vectors.shape[1], facts.get("source"))
        expected = (found[0] if dimension is None else dimension, source or found[1])
        if found != expected:
            raise IndexCorrupt(
                f"{path}: found dimension and source {found}, expected {expected}; remove the "
                "file, it is made again"
            )
        index = cls(vectors.shape[1], search)
        if "centroids" in arrays and search != "exact":
            index._held = _Lists(arrays["centroids"])
            index._held.add(ids, vectors, arrays["lists"])
            index._ids.update(ids.tolist())
        else:
            index.add(ids, vectors)
        return index, version

    def _remove(self, ids: Array) -> int:
        known = [id for id in ids.tolist() if id in self._ids]
        if known:
            self._held.remove(np.array(known, dtype=np.int64))
            self._ids.difference_update(known)
        return len(known)

    def _settle(self) -> None:
        """Make lists where they are wanted and there are none, or where they grew too long."""
        count, held = len(self._ids), self._held
        large = self._wanted == "ivf" or count * self.dimension * 4 >= LARGE
        if self._wanted == "exact" or not large or count < LEAST:
            return
        if isinstance(held, _Exact) or count >= GROWTH * held.usual_count:
            contents = held.contents()
            logger.info("making lists for %d vectors; searches wait for them", count)
            lists = _Lists(_centroids(contents["vectors"]))
            lists.add(contents["ids"], contents["vectors"])
            self._held = lists

    def _nearest(self, query: Array, k: int) -> tuple[Array, Array]:
        """At least the k best, and all that tie with the last of them."""
        ask = k
        while True:
            if ask <= 0:
                return np.empty(0, np.float32), np.empty(0, np.int64)
            scores, ids = self._held.search(query, ask)
            if ask >= len(self._ids) or scores[ask - 1] < scores[k - 1]:
                return scores, ids
            ask = min(2 * ask + 1, len(self._ids))

    def _vectors(self, vectors: Array) -> Array:
        """Validated: float32 [n, dimension], contiguous, finite."""
        rows = np.asarray(vectors)
        if rows.ndim != 2 or rows.shape[1] != self.dimension or rows.dtype != np.float32:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise ConfigError(f"found vectors {found}, expected float32 [n, {self.dimension}]")
        if not np.isfinite(rows).all():
            raise ConfigError("found a vector that is not finite; embed its text again")
        return np.ascontiguousarray(rows)


class _Exact:
    """All vectors in one array. Arguments are valid, ids are there where they must be."""

    def __init__(self, dimension: int) -> None:
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))

    def add(self, ids: Array, vectors: Array) -> None:
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: Array) -> None:
        self._index.remove_ids(ids)

    def search(self, query: Array, k: int) -> tuple[Array, Array]:
        """The k best: scores float32 [k], ids int64 [k]."""
        scores, ids = self._index.search(query, k)
        return scores[0], ids[0]

    def vectors(self, ids: Array) -> Array:
        """float32 [ids, dimension]."""
        return _stacked([self._index.reconstruct(id) for id in ids.tolist()], self._index.d)

    def contents(self) -> dict[str, Array]:
        """What the file holds, in the index's order."""
        ids = faiss.vector_to_array(self._index.id_map).astype(np.int64)
        flat = faiss.downcast_index(self._index.index)
        count = len(ids)
        vectors = flat.reconstruct_n(0, count) if count else np.empty((0, flat.d), "f4")
        return {"ids": ids, "vectors": vectors.astype(np.float32, copy=False)}


class _Lists:
    """Each vector in the list of its nearest centroid; a search reads the lists nearest to it.

    centroids: float32 [lists, dimension].
    """

    def __init__(self, centroids: Array) -> None:
        count, dimension = centroids.shape
        self._centroids = faiss.IndexFlatIP(dimension)
        self._centroids.add(centroids)
        self._index: Any = faiss.IndexIVFFlat(
            self._centroids, dimension, count, faiss.METRIC_INNER_PRODUCT
        )
        self._index.is_trained = True
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
        self._probes = math.ceil(1.5 * math.sqrt(count))

    @property
    def usual_count(self) -> int:
        """About how many vectors so many lists are made for."""
        return int((self._index.nlist / 2) ** 2)

    def add(self, ids: Array, vectors: Array, lists: Array | None = None) -> None:
        """lists: int64, the list of each; None: that of the nearest centroid."""
        if lists is None:
            self._index.add_with_ids(vectors, ids)
            return
        pointers = (faiss.swig_ptr(array) for array in (vectors, ids, lists))
        self._index.add_core(len(ids), *pointers)

    def remove(self, ids: Array) -> None:
        self._index.remove_ids(faiss.IDSelectorArray(len(ids), faiss.swig_ptr(ids)))

    def search(self, query: Array, k: int) -> tuple[Array, Array]:
        """k of the best: scores float32 [k], ids int64 [k]; reads more lists until there are k."""
        probes = self._probes
        while True:
            parameters = faiss.SearchParametersIVF(nprobe=probes)  # type: ignore[call-arg]
            scores, ids = self._index.search(query, k, params=parameters)
            if probes >= self._index.nlist or ids[0, -1] >= 0:
                return scores[0], ids[0]
            probes *= 4

    def vectors(self, ids: Array) -> Array:
        """float32 [ids, dimension]."""
        return _stacked([self._index.reconstruct(id) for id in ids.tolist()], self._index.d)

    def contents(self) -> dict[str, Array]:
        """What the file holds, list by list."""
        index, lists = self._index, self._index.invlists
        sizes = [lists.list_size(number) for number in range(index.nlist)]
        ids, vectors = np.empty(sum(sizes), np.int64), np.empty((sum(sizes), index.d), np.float32)
        start = 0
        for number, size in enumerate(sizes):
            if size:
                part = slice(start, start + size)
                ids[part] = faiss.rev_swig_ptr(lists.get_ids(number), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
                vectors[part] = codes.view(np.float32).reshape(size, index.d)
                start += size
        return {
            "ids": ids,
            "vectors": vectors,
            "centroids": self._centroids.reconstruct_n(0, index.nlist),
            "lists": np.repeat(np.arange(index.nlist, dtype=np.int64), sizes),
        }


def _centroids(vectors: Array) -> Array:
    """Two times as many as the root of the vectors: float32 [centroids, dimension], by k-means.

    From a fixed seed, so the same for the same vectors.
    """
    count, dimension = round(2 * math.sqrt(len(vectors))), vectors.shape[1]
    means: Any = faiss.Kmeans(
        dimension,
        count,
        niter=8,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=64,
        seed=1,
    )
    means.train(vectors)
    found: Array = means.centroids
    return found


def _stacked(rows: list[Array], dimension: int) -> Array:
    return np.stack(rows) if rows else np.empty((0, dimension), np.float32)


def _ids(ids: Array | Iterable[int]) -> Array:
    numbers = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
        raise ConfigError(f"found ids {numbers.dtype} {list(numbers.shape)}, expected int64 [n]")
    return np.ascontiguousarray(numbers, dtype=np.int64)


def _checked(
    path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str]
) -> tuple[dict[str, Array], int]:
    """Arrays and version, as an index has them."""
    shapes = {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}
    version = facts.get("catalog_version", "")
    good = version.isascii() and version.isdecimal() and len(version) < 20
    if not good or not _is_index(tensors):
        raise IndexCorrupt(
            f"{path}: found {shapes} of version {version!r}, expected unique ids int64 [n] and "
            "finite vectors float32 [n, dimension], and perhaps their centroids and lists"
        )
    return {name: tensor.numpy() for name, tensor in tensors.items()}, int(version)


def _is_index(tensors: dict[str, torch.Tensor]) -> bool:
    if list(tensors)[:2] != ["ids", "vectors"] or len(tensors) not in (2, 4):
        return False
    ids, vectors = tensors["ids"], tensors["vectors"]
    return (
        ids.dtype == torch.int64
        and _is_matrix(vectors)
        and list(vectors.shape) == [len(ids), *vectors.shape[1:]]
        and len(np.unique(ids.numpy())) == len(ids)
        and (len(tensors) == 2 or _are_lists(tensors))
    )


def _are_lists(tensors: dict[str, torch.Tensor]) -> bool:
    if list(tensors)[2:] != ["centroids", "lists"]:
        return False
    centroids, lists = tensors["centroids"], tensors["lists"]
    return (
        _is_matrix(centroids)
        and len(centroids) > 0
        and centroids.shape[1] == tensors["vectors"].shape[1]
        and lists.dtype == torch.int64
        and lists.shape == tensors["ids"].shape
        and bool(((lists >= 0) & (lists < len(centroids))).all())
    )


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Whether it is float32 [n, dimension], finite."""
    matrix = tensor.dtype == torch.float32 and tensor.dim() == 2 and tensor.shape[1] > 0
    return matrix and bool(tensor.isfinite().all())
