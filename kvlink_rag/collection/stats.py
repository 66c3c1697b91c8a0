"""What a collection holds, and what its parts have seen since it was opened. Knows counters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .parts import Parts
from .passages import room


@dataclass(frozen=True, slots=True)
class Stats:
    """What a collection holds, and what its store has seen since it was opened.

    tokens: of all passages. bytes_per_token: of the stored snapshots; 0.0 where there are none.
    hits, misses: snapshots asked for and found, or not; corrupt: those refused, which are misses
    too. encoded: those made for questions because they were missing. evicted: to keep the limit.
    dtype: what the model computes in, "" until it is loaded. storage_dtype: of exact and bf16
    snapshots, "" of others and until there are any. budget: what snapshots may take before they
    are asked for, as it was given to `open`; room: the bytes left of that, None for no bound.
    remote: counts of the tier that machines share (`RemoteStats`), None without one.
    """

    documents: int
    embedded: int
    tokens: int
    snapshots: int
    snapshot_bytes: int
    bytes_per_token: float
    hits: int
    misses: int
    corrupt: int
    evicted: int
    encoded: int
    prefix_bytes: int
    prefix_hits: int
    prefix_misses: int
    model: str
    embedder: str
    codec: str
    dtype: str
    storage_dtype: str
    budget: str
    room: int | None
    remote: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def stats(parts: Parts) -> Stats:
    """Counts, bytes and counters, as they are now; loads nothing."""
    seen, prefix, loaded = parts.store.stats(), parts.prefix, parts.loaded.held
    tokens, stored = _tokens(parts)
    left = room(parts)
    return Stats(
        documents=parts.catalog.count(),
        embedded=parts.catalog.embedded(),
        tokens=tokens,
        snapshots=seen.count,
        snapshot_bytes=seen.bytes,
        bytes_per_token=seen.bytes / stored if stored else 0.0,
        hits=seen.hits,
        misses=seen.misses,
        corrupt=seen.corrupt,
        evicted=seen.evicted,
        encoded=loaded.snapshots.encoded if loaded else 0,
        prefix_bytes=prefix.nbytes if prefix else 0,
        prefix_hits=prefix.hits if prefix else 0,
        prefix_misses=prefix.misses if prefix else 0,
        model=parts.settings.model_name,
        embedder=parts.settings.embedder_name,
        codec=parts.settings.codec,
        dtype=loaded.model.backbone.dtype_name if loaded else "",
        storage_dtype=parts.settings.storage_dtype,
        budget=str(parts.budget),
        room=None if left == math.inf else max(0, int(left)),
        remote=parts.remote.stats().to_dict() if parts.remote else None,
    )


def _tokens(parts: Parts) -> tuple[int, int]:
    """Tokens of all passages, and of those distinct ones whose snapshot is stored."""
    total = 0
    stored: dict[str, int] = {}
    held = set(parts.store.keys())
    for key, tokens in parts.catalog.snapshots():
        total += tokens or 0
        if key in held:
            stored[str(key)] = tokens or 0
    return total, sum(stored.values())
