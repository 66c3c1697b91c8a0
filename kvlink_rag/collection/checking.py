"""Finding and mending what is wrong in a collection; encoding it again for another model.

Everything derived (index, snapshots) can be made again from the catalog. Knows the parts of a
collection; each part checks its own files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvlink_rag.errors import CatalogError

from .adding import (
    BATCH,
    AddReport,
    Encodable,
    batched,
    embedded_text,
    encodable,
    encode_missing,
)
from .catalog import Entry

if TYPE_CHECKING:
    from .rag import KVLinkRAG

logger = logging.getLogger(__name__)


def check_collection(rag: KVLinkRAG, fix: bool) -> list[str]:
    """What is wrong, one line each; with `fix`, mend all that can be made again."""
    problems: list[str] = []
    try:
        problems += (f"catalog: {problem}" for problem in _check_catalog(rag, fix))
        problems += _check_index(rag, fix)
        problems += (f"snapshots: {problem}" for problem in rag.store.check(fix))
        problems += _check_unused(rag, fix)
        problems += _check_missing(rag, fix)
    except CatalogError as error:
        if not problems:
            raise
        problems.append(f"catalog: the check ends here: {error}")
    return problems


def reencode(rag: KVLinkRAG) -> None:
    """Encode every document again, for the model now set; the old snapshots go."""
    logger.warning("encoding %d documents again, for another model", len(rag))
    report = AddReport()
    for entries in _batches(rag):
        passages = [encodable(rag, entry.document) for entry in entries]
        _set_snapshots(rag, entries, passages)
        encode_missing(rag, passages, report)
    _check_unused(rag, fix=True)


def reembed(rag: KVLinkRAG) -> None:
    """Embed every document again, for the embedder now set, and make the index anew."""
    logger.warning("embedding %d documents again, for another embedder", len(rag))
    registered = rag.catalog.without_embedding()
    for entries in _batches(rag):
        _embed(rag, [entry for entry in entries if entry.row not in registered])
    rag.reset_index()


def _check_catalog(rag: KVLinkRAG, fix: bool) -> list[str]:
    """The catalog itself; embeddings that it drops as damaged are made again."""
    before = rag.catalog.without_embedding()
    problems = rag.catalog.check(fix)
    dropped = rag.catalog.without_embedding() - before
    if dropped:
        _embed(rag, rag.catalog.by_rows(dropped))
    return problems


def _check_index(rag: KVLinkRAG, fix: bool) -> list[str]:
    """The index file against its own digest, the index against the catalog."""
    problems = list(dict.fromkeys(rag.check_index_file()))
    if problems and fix:
        rag.reset_index()
    return [f"index: {problem}" for problem in problems]


def _check_unused(rag: KVLinkRAG, fix: bool) -> list[str]:
    """Snapshots that no document uses."""
    used = {str(key) for key, _ in rag.catalog.snapshots()}
    unused = sorted(set(rag.store.keys()) - used)
    for key in unused if fix else ():
        rag.store.delete(key)
    return [f"snapshots: {key} belongs to no document" for key in unused]


def _check_missing(rag: KVLinkRAG, fix: bool) -> list[str]:
    """Documents without a snapshot; none is missed where a size limit lets them go."""
    if rag.store.size_limit is not None:
        return []
    problems = []
    for entries in batched(rag.catalog.iterate(skip_damaged=True), BATCH):
        lost = [entry for entry in entries if not rag.has_snapshot(entry)]
        problems += [f"snapshots: document {entry.id!r} has none" for entry in lost]
        if lost and fix:
            passages = [encodable(rag, entry.document) for entry in lost]
            _set_snapshots(rag, lost, passages)
            encode_missing(rag, passages, AddReport())
    return problems


def _batches(rag: KVLinkRAG) -> Iterator[list[Entry]]:
    return batched(rag.catalog.iterate(), BATCH)


def _embed(rag: KVLinkRAG, entries: list[Entry]) -> None:
    vectors = rag.embedder.embed([embedded_text(entry.document) for entry in entries])
    rag.catalog.set_embeddings(zip(entries, vectors, strict=True))


def _set_snapshots(rag: KVLinkRAG, entries: list[Entry], passages: list[Encodable]) -> None:
    rag.catalog.set_snapshots(
        (entry, passage.key, len(passage.token_ids))
        for entry, passage in zip(entries, passages, strict=True)
    )
