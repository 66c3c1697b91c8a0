"""Snapshots in a directory, found by key. Knows no passage, no model and no document."""

from .store import SnapshotStore, StoreStats

__all__ = ["SnapshotStore", "StoreStats"]
