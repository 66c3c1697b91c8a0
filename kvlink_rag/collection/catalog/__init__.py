"""Documents, metadata, embeddings and settings in SQLite: the truth. Knows no snapshot's file."""

from .catalog import Catalog
from .records import Changes, Entry, Record, Upserted, check_unicode

__all__ = ["Catalog", "Changes", "Entry", "Record", "Upserted", "check_unicode"]
