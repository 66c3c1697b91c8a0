"""The collections of a server: those it was given, and stores that clients made.

    data/
      records.sqlite   see `records`
      files/           uploaded originals, a directory each
      stores/          a collection each
      lock             held by the one server that uses this directory

All share one language model and one embedder. A collection is opened when first used, and stays
open; one that is deleted goes when its last reader has left. Knows collections and who may read
them; knows no HTTP.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.errors import ConfigError, StorageError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.retrieval.embedder import Embedder

from .keys import Asker
from .records import Records, Store, new_id, now
from .refusals import Refused, not_found

PREFIX = "kvlink/"  # of the model that answers from a collection
STORE_PREFIX = "vs_"  # of ids of clients' stores
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@dataclass(slots=True)
class _Open:
    rag: KVLinkRAG
    users: int = 0
    changing: threading.RLock = field(default_factory=threading.RLock)


class Library:
    """Collections by id. For any number of threads.

    given: directories of collections by name, which are their ids; they are never deleted. lock:
    of `data`, as `claim` gives it. remote: as in `KVLinkRAG.open`, for those that were given;
    stores of clients share with nobody. Errors as in `claim`.
    """

    def __init__(
        self,
        model: KVLinkModel,
        embedder: Embedder,
        data: Path,
        given: Mapping[str, Path],
        lock: filelock.BaseFileLock | None = None,
        remote: str | None = None,
    ) -> None:
        self._remote = remote
        self.model, self.embedder = model, embedder
        self._data, self._given = data, dict(given)
        self._open: dict[str, _Open] = {}
        self._changed = threading.Condition()
        self._lock = lock or claim(data)
        self.records = Records(data / "records.sqlite")
        self._built = {name: int(path.stat().st_mtime) for name, path in self._given.items()}

    def close(self) -> None:
        """Close every collection; again does nothing."""
        with self._changed:
            for held in self._open.values():
                held.rag.close()
            self._open.clear()
        self.records.close()
        self._lock.release()

    # Which there are

    def readable(self, asker: Asker) -> list[Store]:
        """The collections that `asker` may read, given ones first."""
        given = [Store(name, made, "", name, {}) for name, made in self._built.items()]
        found = [*given, *(s for s in self.records.stores() if not s.leaving)]
        return [store for store in found if asker.may_read(store.id, store.owner)]

    def find(self, id: str, asker: Asker, *, write: bool = False) -> Store:
        """A collection by its id. Raises `Refused`: 404, or 403 where it may not be changed."""
        store = next((s for s in self.readable(asker) if s.id == id), None)
        if store is None:
            raise not_found("vector_store", id)
        if write and not asker.may_write(store.id, store.owner):
            raise Refused(403, f"this key may not change {id!r}", code="read_only")
        return store

    def model_names(self, asker: Asker) -> dict[str, Store]:
        """The name of each collection's model: `kvlink/` and its name, else its id."""
        stores = self.readable(asker)
        ids = {store.id for store in stores}
        names = [store.name for store in stores]
        found = {}
        for store in stores:
            plain = store.name and _WORD.issuperset(store.name) and names.count(store.name) == 1
            taken = store.name in ids and store.name != store.id
            found[PREFIX + (store.name if plain and not taken else store.id)] = store
        return found

    def of_model(self, model: str, asker: Asker) -> Store | None:
        """The collection that a model's name means, by name or id; None for other models."""
        if not model.startswith(PREFIX):
            return None
        named = self.model_names(asker)
        by_id = {PREFIX + store.id: store for store in named.values()}
        return named.get(model) or by_id.get(model)

    def is_given(self, id: str) -> bool:
        """Whether the server was started with it."""
        return id in self._given

    # Use and change

    @contextlib.contextmanager
    def using(self, id: str) -> Iterator[KVLinkRAG]:
        """The collection, open for the block at least. Raises `Refused` where it is gone."""
        held = self._enter(id)
        try:
            yield held.rag
        finally:
            self._leave(held)

    @contextlib.contextmanager
    def changing(self, id: str) -> Iterator[KVLinkRAG]:
        """As `using`, one at a time."""
        held = self._enter(id)
        try:
            with held.changing:
                yield held.rag
        finally:
            self._leave(held)

    def opened(self) -> dict[str, KVLinkRAG]:
        """Those that are open now."""
        with self._changed:
            return {id: held.rag for id, held in self._open.items()}

    def _enter(self, id: str) -> _Open:
        with self._changed:
            if id not in self._open:
                self._open[id] = _Open(self._opened(id))
            held = self._open[id]
            held.users += 1
            return held

    def _leave(self, held: _Open) -> None:
        with self._changed:
            held.users -= 1
            self._changed.notify_all()

    def _opened(self, id: str) -> KVLinkRAG:
        if id in self._given:
            path, create, remote = self._given[id], False, self._remote
        elif any(s.id == id and not s.leaving for s in self.records.stores()):
            path, create, remote = self._directory(id), True, ""
        else:
            raise not_found("vector_store", id)
        return KVLinkRAG.open(
            path, model=self.model, embedder=self.embedder, create=create, remote=remote
        )

    # Stores of clients

    def create(self, owner: str, name: str, metadata: Mapping[str, str]) -> Store:
        """A new, empty store."""
        store = Store(new_id(STORE_PREFIX), now(), owner, name, dict(metadata))
        self.records.add_store(store)
        return store

    def delete(self, id: str) -> None:
        """Erase a store, once nobody reads it. What a kill leaves, `finish_deletions` removes."""
        self.records.leave_store(id)
        with self._changed:
            held = self._open.get(id)
            self._changed.wait_for(lambda: held is None or not held.users)
            if self._open.pop(id, None) is not None and held is not None:
                held.rag.close()
        try:
            if self._directory(id).exists():
                shutil.rmtree(self._directory(id))
        except OSError as error:
            raise StorageError(f"the store {id} cannot be erased: {error}") from error
        self.records.forget_store(id)

    def finish_deletions(self) -> None:
        """Erase the stores whose deletion was cut short."""
        for store in self.records.stores():
            if store.leaving:
                self.delete(store.id)

    def _directory(self, id: str) -> Path:
        return self._data / "stores" / id

    def originals(self, file: str) -> Path:
        """The directory of an uploaded file."""
        return self._data / "files" / file


def claim(data: Path) -> filelock.BaseFileLock:
    """The lock of a server's directory, which is made where it is not there.

    Raises `ConfigError` where another server uses it, `StorageError` where it cannot be made.
    """
    try:
        for part in ("files", "stores"):
            (data / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = filelock.FileLock(data / "lock", thread_local=False, mode=0o600)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConfigError(
            f"another server uses {data}; stop it, or give this one a directory of its own (--data)"
        ) from error
    except OSError as error:
        raise StorageError(f"the server's directory {data} cannot be used: {error}") from error
    return lock
