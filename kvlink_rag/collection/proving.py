"""Stored snapshots against what the model encodes now: a sample of the collection, or all of it.

Finds snapshots that other weights made, which no checksum can. Knows the parts of a collection and
tensors; mends nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlink_rag.arguments import check_count
from kvlink_rag.errors import ConfigError
from kvlink_rag.snapshots.codecs import Storage
from kvlink_rag.snapshots.snapshot import EXACT, AnySnapshot, Snapshot

from .adding import BATCH
from .catalog import Entry
from .parts import Parts
from .passages import batched

if TYPE_CHECKING:
    from kvlink_rag.model.verify import Verification

QUANTISED_TOLERANCE = 0.1  # a number may fall on the next step of its scale


def verify(
    parts: Parts, question: str, *, k: int, sample: int | None, seed: int | None
) -> Verification:
    """See `KVLinkRAG.verify`."""
    check_count(k)
    documents = [entry.document for batch in sampled(parts, k, seed) for entry in batch]
    if not documents:
        raise ConfigError(
            f"{parts.directory} holds no documents, so there is nothing to verify; add some "
            "(kvlink-rag: index PATH)"
        )
    loaded = parts.loaded()
    found = loaded.model.verify(loaded.model.prompt(documents, question), reuse=loaded.reuse)
    compared, wrong = 0, []
    for entries in sampled(parts, sample, seed):
        count, others = wrongly_encoded(parts, entries)
        compared += count
        wrong += [entry.id for entry in others]
    return _with_snapshots(found, compared, wrong)


def _with_snapshots(found: Verification, compared: int, wrong: list[str]) -> Verification:
    if not wrong:
        message = f"{found.message}; {compared} stored snapshots are what the model encodes"
        return replace(found, compared=compared, message=message)
    named = ", ".join(map(repr, wrong[:3])) + (", …" if len(wrong) > 3 else "")
    message = (
        f"{len(wrong)} of {compared} stored snapshots are NOT what this model encodes (documents "
        f"{named}): other weights made them; mend it with check(fix=True, sample=None) "
        "(kvlink-rag: check --fix --sample all)"
    )
    return replace(found, holds=False, compared=compared, wrong=tuple(wrong), message=message)


def sampled(parts: Parts, count: int | None, seed: int | None = None) -> Iterator[list[Entry]]:
    """`count` documents from anywhere in the collection (None: all), in batches.

    seed: draws the same ones again.
    """
    _, rows = parts.catalog.changed_rows(0)
    if count is not None and count < len(rows):
        rows = sorted(random.Random(seed).sample(rows, count))
    for batch in batched(rows, BATCH):
        yield parts.catalog.by_rows(batch)


def wrongly_encoded(parts: Parts, entries: Sequence[Entry]) -> tuple[int, list[Entry]]:
    """How many of these documents have a snapshot, and those whose snapshot is not the model's."""
    loaded = parts.loaded()
    stored: list[tuple[Entry, AnySnapshot]] = []
    for entry in entries:
        ids = loaded.model.passage_tokens(entry.document)
        snapshot = parts.store.get(entry.snapshot_key, ids) if entry.snapshot_key else None
        if snapshot is not None:
            stored.append((entry, snapshot))
    encoded = loaded.model.encoder.many([s.token_ids.tolist() for _, s in stored])
    kept = loaded.snapshots.storage
    wrong = [i for i, made in encoded if not _same(stored[i][1], made, kept)]
    return len(stored), [stored[i][0] for i in sorted(wrong)]


def _same(stored: AnySnapshot, made: Snapshot, storage: Storage) -> bool:
    """Whether two snapshots of one passage differ by no more than rounding.

    That of the dtype they are kept in, if it is the coarser one: the stored snapshot may come from
    a processor that computes in it.
    """
    dtype = made.keys.dtype
    from kvlink_rag.model.verify import TOLERANCE

    tolerance = max(TOLERANCE.get(kind, 6e-2) for kind in (dtype, storage.dtype))
    if storage.codec != EXACT:
        tolerance = QUANTISED_TOLERANCE
    found, expected = stored.exact(dtype), storage.keep(made).exact(dtype)
    return all(_far(a, b) <= tolerance for a, b in zip(found, expected, strict=True))


def _far(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of a layer, root mean square: [layers, …] each."""
    axes = tuple(range(1, expected.dim()))
    difference = (found.double() - expected.double()).square().mean(axes).sqrt()
    scale = expected.double().square().mean(axes).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((difference / scale).max())
