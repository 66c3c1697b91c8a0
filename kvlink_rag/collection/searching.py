"""A question to hits, over one collection. Knows catalog, index and embedder; loads no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvlink_rag.arguments import check_count
from kvlink_rag.documents import Hit
from kvlink_rag.errors import DocumentNotFound
from kvlink_rag.retrieval.contriever import Vectors
from kvlink_rag.retrieval.rounds import Where, retrieve

from .parts import Parts


def search(
    parts: Parts, query: str, k: int, *, rounds: int = 1, where: Where | None = None
) -> list[Hit]:
    """The best `k` documents for `query`, best first; see `retrieve`."""

    def search_many(queries: Sequence[str], k: int) -> list[list[Hit]]:
        if not len(parts.index.current()):
            return [[] for _ in queries]
        vectors = parts.embedder().embed_queries(list(queries))
        return [parts.index.nearest(vector, k, where) for vector in vectors]

    return retrieve(search_many, query, k, rounds)


def search_vector(parts: Parts, vector: Vectors, k: int, where: Where | None = None) -> list[Hit]:
    """The best `k` documents for a vector (float32 [dimension]), best first."""
    check_count(k)
    return parts.index.nearest(vector, k, where) if len(parts.index.current()) else []


def vectors(parts: Parts, ids: Iterable[str]) -> Vectors:
    """The vectors of documents, float32 [ids, dimension], in order. Raises `DocumentNotFound`."""
    wanted = [ids] if isinstance(ids, str) else list(ids)
    index = parts.index.current()
    rows = {entry.id: entry.row for entry in parts.catalog.get(wanted) if entry.row in index}
    if missing := [id for id in wanted if id not in rows]:
        raise DocumentNotFound(f"no vector of id {missing[0]!r} in {parts.directory}")
    return index.vectors([rows[id] for id in wanted])
