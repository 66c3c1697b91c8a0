"""The life of a document.

    text → id → token ids → vector → catalog (one transaction) → vector index
         → keys before RoPE and values → snapshot → store

The catalog is the truth: once a batch is in it, it is never lost; index and snapshots follow from
it and are completed by the next `add`, by `check(fix=True)` or when a question needs them. Knows
the parts of a collection; knows no files of people.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvlink_rag.documents import Document
from kvlink_rag.retrieval.embedder import Vectors, Windowed, count_cut
from kvlink_rag.retrieval.rounds import embedded_text

from .catalog import Entry, Record
from .parts import Parts
from .passages import (
    Encodable,
    batched,
    checked,
    encodable,
    encode_missing,
    has_snapshot,
    remove_unused,
)

BATCH = 256  # documents of one transaction

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class AddReport:
    """What an `add` or `update` did.

    encoded, tokens: of newly encoded snapshots. deferred: passages that are encoded when they are
    asked for, since their snapshots would go over the budget. cut: passages of which the embedder
    did not read the end, as far as it says.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    encoded: int = 0
    tokens: int = 0
    deferred: int = 0
    cut: int = 0


def add(
    parts: Parts,
    documents: Iterable[Document],
    *,
    embed: bool,
    advance: Callable[[int], object] = lambda count: None,
) -> AddReport:
    """Take `documents` in, batch by batch; each batch is durable before the next begins.

    advance: told the documents of each batch that is done. Raises `SettingsMismatch` where another
    process took another model.
    """
    parts.settings.model()
    report = AddReport()
    for batch in batched(documents, BATCH):
        add_batch(parts, batch, report, embed=embed)
        advance(len(batch))
    _tell_cut(parts, report)
    _tell_deferred(parts, report)
    return report


def _tell_cut(parts: Parts, report: AddReport) -> None:
    """Warn of text that search cannot find."""
    if not report.cut:
        return
    embedder = parts.embedder()
    most = f" of {embedder.window} tokens" if isinstance(embedder, Windowed) else ""
    logger.warning(
        "%d passages are longer than the embedder's window%s: search does not know what stands at "
        "their ends; add them in smaller passages (kvlink_rag.split_document)",
        report.cut,
        most,
    )


def _tell_deferred(parts: Parts, report: AddReport) -> None:
    """Warn of passages whose first question will wait for their snapshots.

    Not where the budget is 0: then all of them do, as was asked for.
    """
    if not report.deferred or parts.budget.bytes == 0:
        return
    logger.warning(
        "%d passages are encoded when they are first asked for: the snapshots of %s have reached "
        "their budget (%s); give them more with budget='80%%', '100GB' or 'none' (kvlink-rag index "
        "--budget), or make them smaller with a codec",
        report.deferred,
        parts.directory,
        parts.budget if parts.store.size_limit is None else "the size limit",
    )


def add_batch(
    parts: Parts, documents: Sequence[Document], report: AddReport, *, embed: bool
) -> None:
    """One batch, from text to snapshot."""
    # 1. text → id; of one id given twice, the last one stands
    batch = {str(d.id): d for d in (checked(document) for document in documents)}
    # 2. what the catalog already holds needs no work
    known = {entry.id: entry for entry in parts.catalog.get(batch, skip_damaged=True)}
    fresh = [d for id, d in batch.items() if not _is_indexed(parts, known.get(id), d, embed=embed)]
    # 3. token ids; too long a passage stops the batch before anything of it is stored
    passages = [encodable(parts, document) for document in fresh]
    # 4. vector; that of the same title and text stays
    unread = [d for d in fresh if embed and not _is_embedded(parts, known.get(str(d.id)), d)]
    vectors = _embedded(parts, unread, report)
    # 5. catalog: acknowledged from here on; vector index
    done = parts.catalog.upsert([_record(p, vectors.get(str(p.document.id))) for p in passages])
    parts.index.current()
    report.added += len(done.added)
    report.replaced += len(done.replaced)
    report.unchanged += len(batch) - len(done.added) - len(done.replaced)
    # 6. snapshot, of unchanged documents too where an interrupted run left them out
    written = {p.document.id for p in passages}
    lost = [e for id, e in known.items() if id not in written and not has_snapshot(parts, e)]
    made = encode_missing(parts, [*passages, *(encodable(parts, e.document) for e in lost)])
    report.encoded += len(made.tokens)
    report.tokens += sum(made.tokens)
    report.deferred += made.deferred
    # 7. what was replaced leaves nothing behind
    if done.replaced:
        parts.index.forget_file()
        remove_unused(parts, done.replaced)


def _is_indexed(parts: Parts, entry: Entry | None, document: Document, *, embed: bool) -> bool:
    """Whether `entry` holds `document` as it is, with an embedding if `embed`."""
    if entry is None or entry.document.canonical() != document.canonical():
        return False
    return not embed or entry.row in parts.index.current()


def _is_embedded(parts: Parts, entry: Entry | None, document: Document) -> bool:
    """Whether `entry` has the embedding of this title and text."""
    if entry is None or entry.document.text != document.text:
        return False
    return entry.document.title == document.title and entry.row in parts.index.current()


def _embedded(parts: Parts, documents: Sequence[Document], report: AddReport) -> dict[str, Vectors]:
    """The vector of each document, float32 [dimension], by id."""
    if not documents:
        return {}
    embedder, texts = parts.embedder(), [embedded_text(document) for document in documents]
    vectors = embedder.embed(texts)
    report.cut += count_cut(embedder, texts)
    return {str(document.id): vector for document, vector in zip(documents, vectors, strict=True)}


def _record(passage: Encodable, vector: Vectors | None) -> Record:
    """What the catalog keeps of a passage."""
    return Record(
        document=passage.document,
        snapshot_key=passage.key,
        tokens=len(passage.token_ids),
        embedding=vector,
    )
