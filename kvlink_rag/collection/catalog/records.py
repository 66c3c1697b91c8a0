"""A catalog's documents as plain values, and how they stand in columns. Knows no connection.

What is read is compared with its checksum: the content hash of a document, the digest behind an
embedding. The columns stand in `docs/formats.md`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from kvlink_rag.documents import Document
from kvlink_rag.errors import CatalogError, DocumentError

COLUMNS = (
    "row, id, title, text, metadata, content_hash, snapshot_key, tokens,"
    " embedding IS NOT NULL, version"
)
_KEY = re.compile(r"[0-9a-f]{64}")

Array = npt.NDArray[Any]
Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A document to be written, with its embedding (float32 [dimension]) where there is one."""

    document: Document
    embedding: Array | None = None
    snapshot_key: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A document as the catalog holds it.

    row: its number in the index, never used again for another document.
    content_hash: SHA-256 of id, title, text and metadata, in hexadecimal.
    snapshot_key, tokens: of its snapshot, None while it has none.
    embedded: whether it has an embedding.
    version: the change that wrote it last.
    """

    row: int
    document: Document
    content_hash: str
    snapshot_key: str | None
    tokens: int | None
    embedded: bool
    version: int

    @property
    def id(self) -> str:
        """The document's id."""
        return str(self.document.id)


@dataclass(frozen=True, slots=True)
class Upserted:
    """What `upsert` did: ids added and unchanged, and the entries it replaced, as they were."""

    added: list[str]
    replaced: list[Entry]
    unchanged: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What an index of an earlier version lacks.

    version: the catalog's version that these changes lead to.
    rows: int64 [n] rows to add or replace; vectors: float32 [n, dimension], theirs.
    removed: int64 [m] rows that are gone or have no embedding any more.
    """

    version: int
    rows: Array
    vectors: Array
    removed: Array


@dataclass(frozen=True, slots=True)
class Columns:
    """A record as columns; the embedding with its digest."""

    id: str
    title: str
    text: str
    metadata: str
    content_hash: str
    snapshot_key: str | None
    tokens: int | None
    embedding: bytes | None


def columns_of(record: Record) -> Columns:
    """A record as columns.

    Raises `DocumentError` for text that is not valid Unicode, metadata that is not JSON or a bad
    embedding.
    """
    document = record.document.identified()
    check_unicode(str(document.id), document.title, document.text)
    document.canonical()  # DocumentError where the metadata is not JSON
    metadata = json.dumps(dict(document.metadata), allow_nan=False, separators=(",", ":"))
    document = replace(document, metadata=json.loads(metadata))
    return Columns(
        id=str(document.id),
        title=document.title,
        text=document.text,
        metadata=metadata,
        content_hash=content_hash(document),
        snapshot_key=record.snapshot_key,
        tokens=None if record.tokens is None else int(record.tokens),
        embedding=None if record.embedding is None else pack(record.embedding, str(document.id)),
    )


def content_hash(document: Document) -> str:
    """SHA-256 of id, title, text and metadata, in hexadecimal."""
    content = json.dumps(document.id, ensure_ascii=True) + document.canonical()
    return hashlib.sha256(content.encode()).hexdigest()


def entry(row: Row) -> Entry:
    """A row as an entry. Raises `CatalogError` where its content is not what was written."""
    number, id, title, text, metadata, digest, key, tokens, embedded, version = row
    try:
        document = Document(text=text, title=title, id=id, metadata=json.loads(metadata))
        damaged = content_hash(document) != digest
    except (ValueError, TypeError):
        damaged = True
    if damaged:
        raise CatalogError(
            f"document {id!r} (row {number}) is damaged: its content is not what was written; "
            "delete it and add it again"
        )
    return Entry(number, document, digest, sound_key(key), tokens, bool(embedded), version)


def entries(rows: Iterable[Row], skip_damaged: bool = False) -> list[Entry]:
    """Rows as entries; with `skip_damaged` only those that are what was written."""
    return [entry(row) for row in rows if not skip_damaged or is_whole(row)]


def former(row: Row) -> Entry:
    """A row that is no more, as it was; one that is damaged, without text."""
    if is_whole(row):
        return entry(row)
    number, id, _, _, _, digest, key, tokens, embedded, version = row
    document = Document("", id=str(id) or "?")
    return Entry(number, document, digest, sound_key(key), tokens, bool(embedded), version)


def is_whole(row: Row) -> bool:
    """Whether a row's content is what was written."""
    try:
        entry(row)
    except CatalogError:
        return False
    return True


def sound_key(found: object) -> str | None:
    """A snapshot's key as it is stored; a damaged one is none, and set again by `check`."""
    return found if isinstance(found, str) and _KEY.fullmatch(found) else None


def pack(embedding: Array, id: str) -> bytes:
    """float32, little-endian, and the XXH3-64 of these bytes behind them.

    Raises `DocumentError`, naming the document `id`, for a bad embedding.
    """
    vector = np.asarray(embedding)
    if vector.ndim != 1 or not len(vector) or vector.dtype != np.float32:
        found = f"{vector.dtype} {list(vector.shape)}"
        raise DocumentError(f"document {id!r}: found embedding {found}, expected float32 [n]")
    if not np.isfinite(vector).all():
        raise DocumentError(f"document {id!r}: found an embedding that is not finite")
    data = vector.astype("<f4").tobytes()
    return data + _digest(data)


def is_sound(blob: object) -> bool:
    """Whether an embedding is what was packed; None is no embedding, and sound."""
    if not isinstance(blob, bytes):
        return blob is None
    data, digest = bytes(blob[:-8]), bytes(blob[-8:])
    return len(data) > 0 and len(data) % 4 == 0 and digest == _digest(data)


def changes(version: int, changed: list[Row], gone: list[Row]) -> Changes:
    """Rows with their embeddings, and rows that are gone, as changes that lead to `version`.

    Raises `CatalogError` where an embedding's bytes are not what was written.
    """
    for row, blob in changed:
        if not is_sound(blob):
            raise CatalogError(f"the embedding of row {row} is damaged; run check with fix")
    kept = [(row, blob) for row, blob in changed if blob is not None]
    removed = [row for (row,) in gone] + [row for row, blob in changed if blob is None]
    if len({len(blob) for _, blob in kept}) > 1:
        raise CatalogError("found embeddings of several dimensions; embed all documents again")
    dimension = (len(kept[0][1]) - 8) // 4 if kept else 0
    data = b"".join(bytes(blob[:-8]) for _, blob in kept)
    return Changes(
        version=version,
        rows=np.array([row for row, _ in kept], dtype=np.int64),
        vectors=np.frombuffer(data, dtype="<f4").reshape(len(kept), dimension),
        removed=np.array(removed, dtype=np.int64),
    )


def check_unicode(*texts: str) -> None:
    """Raise `DocumentError` for half a character, which no file can hold as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            start = max(0, error.start - 20)
            raise DocumentError(
                f"found a lone surrogate in {text[start : error.end + 20]!r}, expected valid "
                "Unicode; replace it first: text.encode('utf-8', 'replace').decode()"
            ) from error


def _digest(data: bytes) -> bytes:
    return bytes(xxhash.xxh3_64_digest(data))
