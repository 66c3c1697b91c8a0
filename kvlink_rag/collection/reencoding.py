"""Everything derived made anew, for another model, codec or embedder.

Knows the parts of a collection; `settings` decides when it has to be done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from kvlink_rag.retrieval.rounds import embedded_text

from .adding import BATCH
from .catalog import Entry
from .parts import Parts
from .passages import Encodable, batched, encodable, encode_missing

logger = logging.getLogger(__name__)


def settle(parts: Parts, *, allow: bool) -> None:
    """Compare what was asked for with what the directory remembers; encode again if allowed to.

    Raises `SettingsMismatch`.
    """
    if parts.settings.settle_model(allow):
        reencode(parts)
        parts.settings.finish_model()
    if parts.settings.settle_embedder(allow):
        reembed(parts)
        parts.settings.finish_embedder()


def reencode(parts: Parts) -> None:
    """Encode every document again, for the model now set; the old snapshots go."""
    logger.warning("encoding %d documents again, for another model", parts.catalog.count())
    for entries in batched(parts.catalog.iterate(), BATCH):
        encode_again(parts, entries)
    for key in unused(parts):
        parts.forget(key)


def encode_again(parts: Parts, entries: Sequence[Entry]) -> None:
    """Snapshots of these entries where the store has none for the model now set."""
    passages = [encodable(parts, entry.document) for entry in entries]
    parts.catalog.set_snapshots(_keys(entries, passages))
    encode_missing(parts, passages)


def reembed(parts: Parts) -> None:
    """Embed every document again, for the embedder now set, and make the index anew."""
    logger.warning("embedding %d documents again, for another embedder", parts.catalog.count())
    registered = parts.catalog.without_embedding()
    for entries in batched(parts.catalog.iterate(), BATCH):
        embed_again(parts, [entry for entry in entries if entry.row not in registered])
    parts.index.reset()


def embed_again(parts: Parts, entries: Sequence[Entry]) -> None:
    """New vectors of these entries in the catalog."""
    vectors = parts.embedder().embed([embedded_text(entry.document) for entry in entries])
    parts.catalog.set_embeddings(zip(entries, vectors, strict=True))


def unused(parts: Parts) -> list[str]:
    """Keys of snapshots that no document uses."""
    used = {str(key) for key, _ in parts.catalog.snapshots()}
    return sorted(set(parts.store.keys()) - used)


def _keys(
    entries: Sequence[Entry], passages: Sequence[Encodable]
) -> Iterable[tuple[Entry, str | None, int | None]]:
    for entry, passage in zip(entries, passages, strict=True):
        yield entry, passage.key, len(passage.token_ids)
