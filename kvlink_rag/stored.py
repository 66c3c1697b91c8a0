"""Snapshots from the store, and encoded again where the store has none.

The meeting point of store and engine: a missing, corrupt or evicted snapshot costs time, never an
answer. Knows keys and token ids; knows no documents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from .backbone import Backbone
from .encoding import encode_many
from .errors import StorageError
from .snapshot import EXACT, AnySnapshot, Snapshot, check_codec, in_codec, snapshot_key
from .store import SnapshotStore
from .trace import Trace

TokenIds = tuple[int, ...]

logger = logging.getLogger(__name__)


class StoredSnapshots:
    """The `SnapshotSource` of a collection.

    codec: of the snapshots it keeps. keep: whether a snapshot encoded for a question is stored for
    the next one. users: the ids of the documents of a key, for log lines. encoded: how many the
    store did not have, so far.
    """

    def __init__(
        self,
        store: SnapshotStore,
        backbone: Backbone,
        *,
        codec: str = EXACT,
        keep: bool = True,
        users: Callable[[str], list[str]] = lambda key: [],
    ) -> None:
        self.store, self.backbone, self.keep = store, backbone, keep
        self.codec = check_codec(codec)
        self.encoded = 0
        self._users = users

    def key(self, token_ids: Sequence[int]) -> str:
        """The key of a passage encoded by this model and kept by this codec."""
        backbone = self.backbone
        return snapshot_key(backbone.fingerprint, token_ids, dtype=backbone.dtype, codec=self.codec)

    def put(self, key: str, snapshot: Snapshot) -> AnySnapshot:
        """Store a snapshot just encoded, in the codec; what was stored. Raises `StorageError`."""
        kept = in_codec(snapshot, self.codec)
        self.store.put(key, kept)
        return kept

    def fetch(self, passages: Sequence[TokenIds], trace: Trace) -> list[AnySnapshot]:
        """One snapshot a passage, in order, from the store or encoded now."""
        keys = {ids: self.key(ids) for ids in passages}
        with trace.stage("read"):
            held = self.store.get_many({key: ids for ids, key in keys.items()})
            read = {ids: held[key] for ids, key in keys.items()}
        found = {ids: snapshot for ids, snapshot in read.items() if snapshot is not None}
        trace.snapshots_found += len(found)
        missing = [ids for ids in keys if ids not in found]
        if missing:
            with trace.stage("encode", self.backbone.synchronize):
                found.update(self._encode(missing, keys))
            trace.snapshots_encoded += len(missing)
            self.encoded += len(missing)
        return [found[ids] for ids in passages]

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
        encoded = encode_many(self.backbone, missing)
        made = {missing[i]: in_codec(snapshot, self.codec) for i, snapshot in encoded}
        for ids, snapshot in made.items() if self.keep else ():
            try:
                self.store.put(keys[ids], snapshot)
            except StorageError as error:
                logger.warning("snapshot %s is used but not stored: %s", keys[ids], error)
        return made

    def _named(self, key: str) -> str:
        """The documents of a key, or that none has it: an application's own passage."""
        if not logger.isEnabledFor(logging.INFO):
            return ""
        ids = self._users(key)
        return f"document {', '.join(map(repr, ids[:3]))}" if ids else "a passage of no document"
