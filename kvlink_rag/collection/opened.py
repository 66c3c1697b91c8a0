"""One open collection a directory and process, for callers that know only its name.

The parts of an application (its LLM, its retriever, its ingestion) each name the directory; the
model, the index and the mapped snapshots must be there once. Knows `KVLinkRAG` and nothing else.
"""

from __future__ import annotations

import atexit
import weakref
from pathlib import Path

from kvlink_rag.disk.digests import cache_directory
from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.retrieval.framework_embedders import AnyEmbedder
from kvlink_rag.snapshots.remote import RemoteTier
from kvlink_rag.snapshots.store import SnapshotStore

from .catalog import Catalog
from .opening import remote_url
from .rag import KVLinkRAG

_opened: weakref.WeakKeyDictionary[KVLinkRAG, str] = weakref.WeakKeyDictionary()  # its tier
_lock = ForkSafeLock()


def default_directory() -> Path:
    """`collection` in `KVLINK_CACHE_DIR`, else in the user's cache directory, as on the command
    line."""
    return cache_directory() / "collection"


def shared_collection(
    directory: str | Path | None = None,
    *,
    model: KVLinkModel | str | Path | None = None,
    embedder: AnyEmbedder | str | Path | None = None,
    device: str = "auto",
    codec: str | None = None,
    remote: str | None = None,
) -> KVLinkRAG:
    """The collection in `directory` (None: `default_directory()`), opened once.

    Whoever asks for the same directory gets the same object while anyone holds it, as long as
    model, embedder, device, codec and remote agree; None and "auto" agree with all. Arguments and
    errors as in `KVLinkRAG.open`. It is closed when the last holder lets go, so do not close it.
    """
    path = Path(directory).expanduser() if directory is not None else default_directory()
    with _lock:
        for rag, tier in list(_opened.items()):
            agrees = rag.uses(model, embedder, device, codec) and remote in (None, tier)
            if rag.directory == path.resolve() and agrees:
                return rag
        rag = KVLinkRAG.open(
            path, model=model, embedder=embedder, device=device, codec=codec, remote=remote
        )
        weakref.finalize(rag, _release, rag.store, rag.catalog, rag.parts.remote)
        _opened[rag] = remote_url(remote)
        return rag


def _release(store: SnapshotStore, catalog: Catalog, remote: RemoteTier | None) -> None:
    """Close the files of a collection that nobody holds any more, and its tier."""
    if remote is not None:
        remote.close()
    store.close()
    catalog.close()


@atexit.register
def _close_all() -> None:
    for rag in list(_opened):
        rag.close()
