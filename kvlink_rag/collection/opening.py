"""A directory to the parts of a collection: arguments checked, files opened, nothing loaded.

Every argument is checked before the directory is touched, and whatever fails on the way releases
what was opened. Knows the names of the files; knows neither life.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kvlink_rag.arguments import parse_repair
from kvlink_rag.errors import StorageError
from kvlink_rag.prompt.recognition import Recogniser
from kvlink_rag.snapshots.device_cache import DeviceMemory, default_budget
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.remote import open_remote
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

from .catalog import Catalog
from .parts import Loaded, Once, Parts
from .search_index import SearchIndex
from .settings import Asked, Settings

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel

REMOTE = "KVLINK_REMOTE"  # the environment's tier, where `open` names none
CATALOG, INDEX, SNAPSHOTS, LOCK = "catalog.sqlite", "index.faiss", "snapshots", "write.lock"


def open_parts(
    directory: str | Path,
    asked: Asked,
    *,
    create: bool,
    size_limit: int | None,
    prefix_budget: int,
    min_tokens: int,
    device_budget: int | None,
    pinned_budget: int,
    remote: str | None,
) -> Parts:
    """The parts of the collection in `directory`. Errors as in `KVLinkRAG.open`."""
    path = _directory(directory, create)
    with ExitStack() as opened:
        catalog = Catalog.open(path / CATALOG, create=create, siblings=[INDEX, SNAPSHOTS])
        opened.callback(catalog.close)
        settings = Settings(catalog, asked)
        store = SnapshotStore(
            path / SNAPSHOTS, size_limit=size_limit, compress=settings.compression != "none"
        )
        opened.callback(store.close)
        prefix = PrefixCache(prefix_budget) if prefix_budget else None
        url = remote_url(remote)

        def wanted(key: str) -> bool:
            return catalog.snapshot_users(key) > 0

        tier = open_remote(url, catalog.identity, path, store.file_of, wanted) if url else None

        def load() -> Loaded:
            model, kept = settings.model(), settings.storage
            memory = _device_memory(model, device_budget, pinned_budget)
            snapshots = StoredSnapshots(
                store, model.encoder, codec=kept, users=catalog.users, memory=memory, remote=tier
            )
            # kept runs come from what was read, so they depend on how that is kept
            scope = f"{catalog.identity} {kept.codec} {kept.dtype_name}"
            reuse = Reuse(snapshots, prefix, scope, memory, parse_repair(settings.repair))
            recogniser = Recogniser(
                catalog, model.tokenizer, min_tokens=min_tokens, most=model.spec.max_passages
            )
            return Loaded(model, snapshots, reuse, recogniser)

        opened.pop_all()
        index = SearchIndex(path / INDEX, catalog)
        return Parts(path, catalog, store, index, settings, prefix, tier, Once(load))


def remote_url(remote: str | None) -> str:
    """The tier that is meant: what is named, else the environment's; empty for none."""
    return os.environ.get(REMOTE, "") if remote is None else remote


def _directory(directory: str | Path, create: bool) -> Path:
    """The resolved path of the directory, made where `create` says so; no part may be a link."""
    try:
        path = Path(directory).expanduser()
        if path.is_file():
            raise StorageError(f"found a file at {path}, expected a directory; give another")
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve(strict=True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"the directory {directory} cannot be opened: {error}") from error
    for name in (CATALOG, INDEX, SNAPSHOTS, LOCK):
        if (path / name).is_symlink():
            raise StorageError(
                f"{path / name} is a symbolic link, which is not followed; remove it, or link "
                "the directory as a whole"
            )
    return path


def _device_memory(model: KVLinkModel, budget: int | None, pinned: int) -> DeviceMemory | None:
    """Where hot snapshots are kept on the model's device; None on a CPU unless asked for."""
    device = model.backbone.device
    if budget is None:
        budget = default_budget(device)
    if device.type != "cuda" and not budget and not pinned:
        return None
    return DeviceMemory(model.backbone.side, budget, pinned)
