"""What the two lives of a collection work with: a few open things, two of them loaded when needed.

Knows which parts there are and how they are put together; knows no step of either life.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from kvlink_rag.arguments import Budget
from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.prompt.recognition import Recogniser
from kvlink_rag.retrieval.embedder import Embedder
from kvlink_rag.snapshots.kept_runs import PrefixCache
from kvlink_rag.snapshots.remote import RemoteTier, note_erasure
from kvlink_rag.snapshots.sources import Reuse, StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

from .catalog import Catalog
from .search_index import SearchIndex
from .settings import Settings

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel

Thing = TypeVar("Thing")


class Once(Generic[Thing]):
    """A thing that is loaded when first asked for, once, under a lock of its own."""

    def __init__(self, load: Callable[[], Thing]) -> None:
        self._load = load
        self._lock = ForkSafeLock()
        self.held: Thing | None = None

    def __call__(self) -> Thing:
        """The thing; others who ask meanwhile wait for the one that loads it."""
        with self._lock:
            if self.held is None:
                self.held = self._load()
            return self.held


@dataclass(frozen=True, slots=True)
class Loaded:
    """The language model, and what needs its tokenizer, its spec or its device."""

    model: KVLinkModel
    snapshots: StoredSnapshots
    reuse: Reuse
    recogniser: Recogniser


@dataclass(slots=True)
class Seen:
    """What was recognised in the prompts of others so far, and of what was warned."""

    passages: int = 0
    prompts_without: int = 0
    told: set[str] = field(default_factory=set)

    def first(self, what: str) -> bool:
        """Whether `what` was not told before; it is now."""
        new = what not in self.told
        self.told.add(what)
        return new


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an open collection.

    prefix: computed runs kept between questions, or None. remote: a tier of snapshots that other
    machines share, or None. loaded: the model's part, loaded by the
    first call.
    """

    directory: Path
    catalog: Catalog
    store: SnapshotStore
    index: SearchIndex
    settings: Settings
    prefix: PrefixCache | None
    remote: RemoteTier | None
    loaded: Once[Loaded]
    seen: Seen = field(default_factory=Seen)

    @property
    def budget(self) -> Budget:
        """Of snapshots that nobody has asked for yet."""
        return self.settings.budget

    def forget(self, key: str) -> None:
        """Remove a snapshot, wherever it is kept."""
        self.store.delete(key)
        if self.remote is not None:
            self.remote.erase(key)
        else:
            note_erasure(self.directory, key)

    def embedder(self) -> Embedder:
        """The embedder, loaded by the first call. Raises `SettingsMismatch`."""
        return self.settings.embedder()

    def close(self) -> None:
        """Save the index and release the directory. Nothing is lost without it."""
        self.index.close()
        if self.remote is not None:
            self.remote.close()
        self.store.close()
        self.catalog.close()
