"""Documents on their way to snapshots: checked, tokenised, encoded where the store has none.

Shared by adding, checking and re-encoding. Knows the parts of a collection; decides nothing about
which documents there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from kvlink_rag.disk import atomic_files
from kvlink_rag.documents import Document, bounded
from kvlink_rag.errors import DocumentError, PassageTooLong

from .catalog import Entry, check_unicode
from .parts import Parts

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel
    from kvlink_rag.snapshots.sources import StoredSnapshots

FETCHED = 8  # passages that are asked for in the remote tier within one time limit
ANSWER_ROOM = 64  # tokens of the window that a single passage must leave free


@dataclass(frozen=True, slots=True)
class Encodable:
    """A passage on its way to a snapshot."""

    document: Document
    token_ids: tuple[int, ...]
    key: str


def checked(document: Document) -> Document:
    """`document` with an id.

    Raises `DocumentError` where it is none, has no text, half a character or metadata nested
    without end.
    """
    if not isinstance(document, Document):
        raise DocumentError(f"found a {type(document).__name__}, expected a kvlink_rag.Document")
    name = document.id or document.title or "(no id)"
    if not document.text.strip():
        raise DocumentError(f"document {name!r} has no text; leave it out")
    check_unicode(document.title, document.text)
    bounded(document.metadata, f"the metadata of document {name!r}")
    return document.identified()


def encodable(parts: Parts, document: Document) -> Encodable:
    """`document` for the model and the codec of a collection. Raises as `encodable_by`."""
    loaded = parts.loaded()
    return encodable_by(loaded.model, loaded.snapshots, document)


def encodable_by(model: KVLinkModel, snapshots: StoredSnapshots, document: Document) -> Encodable:
    """Token ids and key of `document`. Raises `PassageTooLong` beyond the model's window."""
    ids = model.passage_tokens(document)
    most = model.window - ANSWER_ROOM - len(model.spec.header)
    if len(ids) > most:
        raise PassageTooLong(
            f"document {document.id!r} has {len(ids)} tokens, the model's window leaves room for "
            f"{most}; split it with kvlink_rag.split_document"
        )
    return Encodable(document, ids, snapshots.key(ids))


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens: of each snapshot that was made. deferred: passages over the budget, left for when
    they are asked for.
    """

    tokens: list[int]
    deferred: int = 0


def encode_missing(parts: Parts, passages: Sequence[Encodable]) -> Encoded:
    """Encode and store the passages whose snapshots the store lacks, as far as the budget goes.

    None where snapshots depend on the slot (rank "exact"): those are encoded for each question.
    """
    loaded = parts.loaded()
    if loaded.model.spec.rank == "exact":
        return Encoded([])
    waiting = list({p.key: p for p in passages if p.key not in parts.store}.values())
    if parts.remote is not None:
        for some in batched(waiting, FETCHED):
            list(loaded.snapshots.from_remote({p.token_ids: p.key for p in some}))
        waiting = [p for p in waiting if p.key not in parts.store]
    taken = list(_within_budget(parts, waiting))
    for index, snapshot in loaded.model.encoder.many([p.token_ids for p in taken]):
        loaded.snapshots.put(taken[index].key, snapshot)
    return Encoded([len(p.token_ids) for p in taken], len(waiting) - len(taken))


def room(parts: Parts) -> float:
    """Bytes that snapshots may still take before they are asked for.

    Of a share, what they have already counts as free: the collection is one part of the disk, and
    does not creep on to the whole of it.
    """
    budget, used = parts.budget, parts.store.bytes()
    left = [math.inf]
    if budget.bytes is not None:
        left.append(budget.bytes - used)
    if budget.share is not None:
        free = atomic_files.free_bytes(parts.directory)
        left.append(budget.share * (free + used) - used)
    if parts.store.size_limit is not None:
        left.append(parts.store.size_limit - used)
    return min(left)


def _within_budget(parts: Parts, passages: Sequence[Encodable]) -> Iterator[Encodable]:
    """The first of `passages` whose snapshots there is room for."""
    left = room(parts) if passages else 0.0
    for passage in passages:
        left -= parts.loaded().snapshots.planned_bytes(len(passage.token_ids))
        if left < 0:
            return
        yield passage


def has_snapshot(parts: Parts, entry: Entry) -> bool:
    """Whether the store holds this entry's snapshot."""
    return entry.snapshot_key is not None and entry.snapshot_key in parts.store


def remove_unused(parts: Parts, gone: Iterable[Entry]) -> None:
    """Remove the snapshots of replaced or deleted entries that no other document shares."""
    for key in {entry.snapshot_key for entry in gone}:
        if key is not None and parts.catalog.snapshot_users(key) == 0:
            parts.forget(key)


Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
