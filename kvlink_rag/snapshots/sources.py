"""Where the snapshots of a prompt's passages come from, and what is reused beside them.

`StoredSnapshots` is the meeting point of store and engine: a missing, corrupt or evicted snapshot
costs time, never an answer. `EncodeNow` is for models without a collection. Knows keys and token
ids; knows no documents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvlink_rag.arguments import UNREPAIRED, Repair
from kvlink_rag.errors import ConfigError, KVLinkError, StorageError
from kvlink_rag.trace import Trace

from .codecs import Storage
from .device_cache import DeviceMemory
from .encode import PassageEncoder
from .file_format import planned_size, snapshot_key
from .kept_runs import PrefixCache
from .remote import RemoteTier
from .snapshot import EXACT, AnySnapshot, Snapshot, Source
from .store import SnapshotStore

if TYPE_CHECKING:
    from kvlink_rag.engine.backbone import Backbone

TokenIds = tuple[int, ...]

logger = logging.getLogger(__name__)


class SnapshotSource(Protocol):
    """Where the snapshots of a prompt's passages come from."""

    def fetch(self, passages: Sequence[TokenIds], trace: Trace) -> Sequence[Source]:
        """One snapshot a passage (token ids), in order; times and counts go into `trace`."""
        ...


class EncodeNow:
    """The source that keeps nothing: every passage is encoded when asked for, once a prompt.

    codec: what the snapshots go through, as those of a collection with this codec would.
    """

    def __init__(self, encoder: PassageEncoder, codec: str | Storage = EXACT) -> None:
        self.encoder, self.storage = encoder, _storage(codec, encoder.backbone)

    def fetch(self, passages: Sequence[TokenIds], trace: Trace) -> list[AnySnapshot]:
        """See `SnapshotSource`."""
        unique = list(dict.fromkeys(passages))
        with trace.stage("encode", self.encoder.backbone.synchronize):
            encoded = self.encoder.many(unique)
            made = {unique[i]: self.storage.keep(snapshot) for i, snapshot in encoded}
        trace.snapshots_encoded += len(unique)
        return [made[ids] for ids in passages]


class StoredSnapshots:
    """The `SnapshotSource` of a collection.

    codec: of the snapshots it keeps, or their `Storage`. keep: whether a snapshot encoded for a
    question is stored for the next one. users: the ids of the documents of a key, for log lines.
    encoded: how many the store did not have, so far. memory: where hot ones are kept on the device,
    or None. remote: a tier that other machines share, or None.
    """

    def __init__(
        self,
        store: SnapshotStore,
        encoder: PassageEncoder,
        *,
        codec: str | Storage = EXACT,
        keep: bool = True,
        users: Callable[[str], list[str]] = lambda key: [],
        memory: DeviceMemory | None = None,
        remote: RemoteTier | None = None,
    ) -> None:
        self.store, self.encoder, self.keep = store, encoder, keep
        self.backbone = encoder.backbone
        self.storage = _storage(codec, self.backbone)
        self.memory, self.remote = memory, remote
        self.encoded = 0
        self._users = users

    @property
    def codec(self) -> str:
        """The codec of its snapshots to this model, see `Snapshot.codec_for`."""
        return self.storage.codec_for(self.backbone.dtype)

    def key(self, token_ids: Sequence[int]) -> str:
        """The key of a passage encoded by this model and kept by this codec."""
        return self._keys([token_ids])[0]

    def _keys(self, passages: Sequence[Sequence[int]]) -> list[str]:
        """The keys of several passages; the fingerprint looks at every parameter, so once."""
        fingerprint, kept = self.encoder.fingerprint, self.storage
        return [
            snapshot_key(fingerprint, ids, dtype=kept.dtype, codec=kept.codec) for ids in passages
        ]

    def planned_bytes(self, tokens: int) -> int:
        """What the snapshot of a passage of so many tokens takes on the disk; compressed, less."""
        backbone = self.backbone
        shape = (backbone.layers, backbone.kv_heads, tokens, backbone.head_dim)
        return planned_size(shape, self.storage)

    def put(self, key: str, snapshot: Snapshot) -> AnySnapshot:
        """Store a snapshot just encoded, in the codec; what was stored.

        Raises `StorageError`; `ConfigError` where the weights are no longer those of `key`.
        """
        if self.key(snapshot.token_ids.tolist()) != key:
            raise ConfigError(
                "the model's weights changed while it encoded passages, so what it made is not "
                "kept; change them before or after, then add the documents again"
            )
        kept = self.storage.keep(snapshot)
        self.store.put(key, kept)
        if self.remote is not None:
            self.remote.offer(key)
        return kept

    def fetch(self, passages: Sequence[TokenIds], trace: Trace) -> Sequence[Source]:
        """One snapshot a passage, in order: of the device, the store, the tier, or encoded now."""
        unique = list(dict.fromkeys(passages))
        keys = dict(zip(unique, self._keys(unique), strict=True))
        with trace.stage("read"):
            found = self._on_device(keys)
            asked = {key: ids for ids, key in keys.items() if ids not in found}
            for key, snapshot in self.store.get_many(asked).items():
                if snapshot is not None:
                    found[asked[key]] = self._to_device(key, snapshot)
            lacking = {ids: key for ids, key in keys.items() if ids not in found}
            for ids, snapshot in self.from_remote(lacking):
                found[ids] = self._to_device(keys[ids], snapshot)
        trace.snapshots_found += len(found)
        missing = [ids for ids in keys if ids not in found]
        if missing:
            with trace.stage("encode", self.backbone.synchronize):
                for ids, snapshot in self._encode(missing, keys).items():
                    found[ids] = self._to_device(keys[ids], snapshot)
            trace.snapshots_encoded += len(missing)
            self.encoded += len(missing)
        return [found[ids] for ids in passages]

    def from_remote(self, keys: Mapping[TokenIds, str]) -> Iterator[tuple[TokenIds, AnySnapshot]]:
        """Those that the tier has, each checked to be what this model would have stored.

        keys: by token ids. What is found is in the store from then on.
        """
        if self.remote is None:
            return
        files = self.remote.fetch({k: self.planned_bytes(len(ids)) for ids, k in keys.items()})
        backbone = self.backbone
        for ids, key in keys.items():
            if (file := files.get(key)) is None:
                continue
            shape = (backbone.layers, backbone.kv_heads, len(ids), backbone.head_dim)
            try:
                yield ids, self.store.adopt(key, file, ids, shape)
            except KVLinkError as error:  # also of a compressed one, without zstandard here
                self.remote.refuse(key, error)

    def _on_device(self, keys: dict[TokenIds, str]) -> dict[TokenIds, Source]:
        """Those that are kept in the device's memory, or pinned for it."""
        if self.memory is None:
            return {}
        held = {ids: self.memory.get(key) for ids, key in keys.items()}
        return {ids: snapshot for ids, snapshot in held.items() if snapshot is not None}

    def _to_device(self, key: str, snapshot: AnySnapshot) -> Source:
        return snapshot if self.memory is None else self.memory.take(key, snapshot)

    def _encode(
        self, missing: Sequence[TokenIds], keys: dict[TokenIds, str]
    ) -> dict[TokenIds, AnySnapshot]:
        for key in (keys[ids] for ids in missing):
            logger.info(
                "encoding %s now: the store has no sound snapshot %s (lost, evicted, refused or "
                "never made)",
                self._named(key),
                key,
            )
        encoded = self.encoder.many(missing)
        made = {missing[i]: self.storage.keep(snapshot) for i, snapshot in encoded}
        keep = self.keep and self._keys(missing) == [keys[ids] for ids in missing]
        if self.keep and not keep:
            logger.warning("the model's weights changed meanwhile: what it encoded is not stored")
        for ids, snapshot in made.items() if keep else ():
            try:
                self.store.put(keys[ids], snapshot)
                if self.remote is not None:
                    self.remote.offer(keys[ids])
            except StorageError as error:
                logger.warning("snapshot %s is used but not stored: %s", keys[ids], error)
        return made

    def _named(self, key: str) -> str:
        """The documents of a key, or that none has it: an application's own passage."""
        if not logger.isEnabledFor(logging.INFO):
            return ""
        ids = self._users(key)
        return f"document {', '.join(map(repr, ids[:3]))}" if ids else "a passage of no document"


def _storage(codec: str | Storage, backbone: Backbone) -> Storage:
    """What `codec` means to a model. Raises `ConfigError` where there is no such codec."""
    return codec if isinstance(codec, Storage) else Storage.of(codec, backbone.dtype)


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a collection brings to a model: its snapshots and its kept runs (None: keep none).

    scope: of the kept runs; another one for each storage, since runs come from what they follow.
    memory: where on the device its snapshots are kept, or None. repair: of passages, where a
    question does not ask for another.
    """

    snapshots: SnapshotSource
    prefix: PrefixCache | None = None
    scope: str = ""
    memory: DeviceMemory | None = None
    repair: Repair = UNREPAIRED
