"""Encoding without a collection: on many machines at once, into the tier that they share.

    batch of texts → token ids → snapshots that the tier lacks → the tier

A `PassageWriter` is a callable class, as `map_batches` of Ray Data and its like take them: each
worker loads the model once. The collection stays with one writer; where it adds the same documents
it finds their snapshots in the tier. Knows models, snapshots and the tier; no catalog.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, DocumentError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.snapshots.remote import open_remote
from kvlink_rag.snapshots.sources import StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

from .passages import FETCHED, batched, checked, encodable_by
from .storage import storage_for

Column = Sequence[Any]
PATIENCE = 60.0  # seconds for each operation of the tier, where its URL does not say


class PassageWriter:
    """Encodes batches of passages into a tier.

        ray.data.DataContext.get_current().actor_task_retry_on_errors = True
        rows = ray.data.read_json("passages.jsonl")
        where = {"remote": "s3://bucket/snapshots?namespace=handbook", "codec": "bf16"}
        pool = ray.data.ActorPoolStrategy(size=8)
        rows.map_batches(PassageWriter, fn_constructor_kwargs=where, compute=pool).materialize()

    remote: the tier's URL, which names the namespace that the collection is opened with; without a
    `timeout` there each operation may take a minute. model: as in `KVLinkRAG.open`. codec: that of
    the collection; None: as a new collection on this machine has it, so name it where machines
    differ. text, title: the columns of a batch; title None: "title", where there is one. For any
    number of threads, one batch at a time. Raises `ConfigError` for a tier without a namespace, or
    a model whose snapshots depend on their place in the prompt.
    """

    def __init__(
        self,
        *,
        remote: str,
        model: KVLinkModel | str | Path | None = None,
        codec: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        text: str = "text",
        title: str | None = None,
    ) -> None:
        self._text, self._title = text, title
        self._one_batch = threading.Lock()
        with ExitStack() as opened:  # what names a wrong place is told before a model is loaded
            directory = Path(tempfile.mkdtemp(prefix="kvlink-writer-"))
            opened.callback(shutil.rmtree, directory, ignore_errors=True)
            self._store = SnapshotStore(directory / "snapshots")
            opened.callback(self._store.close)
            read = self._store.file_of
            self._tier = open_remote(remote, "", directory, read, timeout=PATIENCE)
            opened.callback(self._tier.close)
            self._model = _loaded(model, device, dtype)
            encoder, storage = self._model.encoder, storage_for(self._model, {}, codec)
            self._kept = StoredSnapshots(self._store, encoder, codec=storage)
            self._known = StoredSnapshots(self._store, encoder, codec=storage, remote=self._tier)
            self._close = weakref.finalize(self, _close_here, os.getpid(), opened.pop_all())

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, list[Any]]:
        """Encode what the tier lacks, and write it before this returns.

        batch: columns of equal length. Returns, for each row in order, `key` (of its snapshot),
        `tokens` and `encoded` (False where the tier had it, or an earlier row). Raises
        `DocumentError` and `PassageTooLong` for a row that is no passage, before any is encoded,
        and what the tier's client raises: such a batch is to be tried again, and encodes only what
        is still lacking.
        """
        passages = [encodable_by(self._model, self._kept, d) for d in self._documents(batch)]
        keys = {passage.token_ids: passage.key for passage in passages}
        with self._one_batch:
            made = self._write_missing(keys)
        encoded = []
        for passage in passages:
            encoded.append(passage.token_ids in made)
            made.discard(passage.token_ids)  # a row that comes again
        return {
            "key": [passage.key for passage in passages],
            "tokens": [len(passage.token_ids) for passage in passages],
            "encoded": encoded,
        }

    def close(self) -> None:
        """Release what is on this machine; what was written stays in the tier."""
        self._close()

    def _write_missing(self, keys: Mapping[tuple[int, ...], str]) -> set[tuple[int, ...]]:
        """Encode and write what the tier does not have, and say what that was."""
        try:
            there = set()
            for some in batched(keys, FETCHED):
                there |= {ids for ids, _ in self._known.from_remote({i: keys[i] for i in some})}
            lacking = [ids for ids in keys if ids not in there]
            for index, snapshot in self._model.encoder.many(lacking):
                self._kept.put(keys[lacking[index]], snapshot)
                self._tier.write(keys[lacking[index]])
            return set(lacking)
        finally:
            for key in keys.values():
                self._store.delete(key)

    def _documents(self, batch: Mapping[str, Column]) -> list[Document]:
        for name in (self._text, self._title or self._text):
            if name not in batch:
                found = ", ".join(map(str, batch))
                raise DocumentError(f"found no column {name!r}, but {found}; name yours")
        texts = batch[self._text]
        titles = batch.get(self._title or "title", [None] * len(texts))
        if len(titles) != len(texts):
            raise DocumentError(f"found {len(titles)} titles for {len(texts)} texts")
        return [_document(row, *pair) for row, pair in enumerate(zip(texts, titles, strict=True))]


def _loaded(model: KVLinkModel | str | Path | None, device: str, dtype: str) -> KVLinkModel:
    if not isinstance(model, KVLinkModel):
        model = KVLinkModel.from_pretrained(model or DEFAULT, device=device, dtype=dtype)
    if model.spec.rank == "exact":
        raise ConfigError(
            f"the snapshots of {model.name} depend on the passage's place in the prompt "
            "(rank: exact), so none can be encoded before its question"
        )
    return model


def _document(row: int, text: Any, title: Any) -> Document:
    """One row as a passage. Raises `DocumentError` for what is no text."""
    title = "" if _is_missing(title) else title
    for what, value in (("text", text), ("title", title)):
        if not isinstance(value, str):
            raise DocumentError(
                f"the {what} of row {row} is a {type(value).__name__}, expected str"
            )
    return checked(Document(text, title=title))


def _is_missing(value: Any) -> bool:
    """None, or what pandas has in its place."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ == "NAType"


def _close_here(pid: int, opened: ExitStack) -> None:
    """Nothing in a forked child: what lies here is its parent's."""
    if os.getpid() == pid:
        opened.close()
