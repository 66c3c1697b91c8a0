"""The life of a document.

    text → id → embedding → catalog (one transaction) → vector index
         → token ids → keys before RoPE and values → snapshot → store

The catalog is the truth: once a batch is in it, it is never lost; index and snapshots follow from
it and are completed by the next `add`, by `check(fix=True)` or when a question needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError, PassageTooLong
from kvlink_rag.snapshots.encode import encode_many

from .catalog import Entry, Record

if TYPE_CHECKING:
    from .rag import KVLinkRAG

BATCH = 256
ANSWER_ROOM = 64  # tokens of the window that a single passage must leave free

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class AddReport:
    """What an `add` or `update` did. tokens and bytes count newly encoded snapshots."""

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    encoded: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Encodable:
    """A passage on its way to a snapshot."""

    document: Document
    token_ids: tuple[int, ...]
    key: str


def index_documents(
    rag: KVLinkRAG,
    documents: Iterable[Document],
    *,
    embed: bool,
    advance: Callable[[int], object],
) -> AddReport:
    """Take `documents` in, batch by batch; each batch is durable before the next begins."""
    report = AddReport()
    for batch in batched(documents, BATCH):
        index_batch(rag, batch, report, embed=embed, advance=advance)
    return report


def index_batch(
    rag: KVLinkRAG,
    documents: Sequence[Document],
    report: AddReport,
    *,
    embed: bool,
    advance: Callable[[int], object],
) -> None:
    """One batch, from text to snapshot."""
    # 1. text → id; of one id given twice, the last one stands
    batch = {str(d.id): d for d in (checked(document) for document in documents)}
    # 2. what the catalog already holds needs no work
    known = {entry.id: entry for entry in rag.catalog.get(batch, skip_damaged=True)}
    fresh = [d for id, d in batch.items() if not rag.is_indexed(known.get(id), d, embed=embed)]
    # 3. token ids; too long a passage stops the batch before anything of it is stored
    passages = [encodable(rag, document) for document in fresh]
    # 4. embedding
    vectors = rag.embedder.embed([embedded_text(d) for d in fresh]) if embed and fresh else None
    # 5. catalog: acknowledged from here on; vector index
    done = rag.catalog.upsert([make_record(p, vectors, i) for i, p in enumerate(passages)])
    rag.refresh_index()
    report.added += len(done.added)
    report.replaced += len(done.replaced)
    report.unchanged += len(batch) - len(done.added) - len(done.replaced)
    # 6. snapshots, of unchanged documents too where an interrupted run left them out
    written = {p.document.id for p in passages}
    lost = [e for id, e in known.items() if id not in written and not rag.has_snapshot(e)]
    encode_missing(rag, [*passages, *(encodable(rag, e.document) for e in lost)], report)
    remove_unused(rag, done.replaced)
    advance(len(documents))


def encode_missing(rag: KVLinkRAG, passages: Sequence[Encodable], report: AddReport) -> None:
    """Encode and store every passage whose snapshot the store does not hold."""
    if rag.model.spec.rank == "exact":
        return  # such a snapshot depends on its slot: it is encoded when a question needs it
    missing = {p.key: p for p in passages if p.key not in rag.store}
    waiting = list(missing.values())
    for index, snapshot in encode_many(rag.model.backbone, [p.token_ids for p in waiting]):
        rag.snapshots.put(waiting[index].key, snapshot)
        report.encoded += 1
        report.tokens += len(waiting[index].token_ids)


def remove_unused(rag: KVLinkRAG, gone: Iterable[Entry]) -> None:
    """Remove the snapshots of replaced or deleted entries that no other document shares."""
    for key in {entry.snapshot_key for entry in gone}:
        if key is not None and rag.catalog.snapshot_users(key) == 0:
            rag.store.delete(key)


def checked(document: Document) -> Document:
    """`document` with an id. Raises `DocumentError` where it is none or has no text."""
    if not isinstance(document, Document):
        raise DocumentError(f"found a {type(document).__name__}, expected a kvlink_rag.Document")
    if not document.text.strip():
        name = document.id or document.title or "(no id)"
        raise DocumentError(f"document {name!r} has no text; leave it out")
    return document.identified()


def encodable(rag: KVLinkRAG, document: Document) -> Encodable:
    """Token ids and key of `document`. Raises `PassageTooLong` beyond the model's window."""
    ids = rag.model.passage_tokens(document)
    most = rag.model.window - ANSWER_ROOM
    if len(ids) > most:
        raise PassageTooLong(
            f"document {document.id!r} has {len(ids)} tokens, the model's window leaves room for "
            f"{most}; split it with kvlink_rag.split_document"
        )
    return Encodable(document, ids, rag.snapshots.key(ids))


def make_record(passage: Encodable, vectors: np.ndarray | None, index: int) -> Record:
    """What the catalog keeps of a passage."""
    return Record(
        document=passage.document,
        snapshot_key=passage.key,
        tokens=len(passage.token_ids),
        embedding=None if vectors is None else vectors[index],
    )


def embedded_text(document: Document) -> str:
    """What the embedder reads: title and text, as Contriever was used in the paper."""
    return f"{document.title} {document.text}" if document.title else document.text


Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
