"""Encoding without a collection: on many machines at once, into the tier that they share.

    batch of texts → token ids → snapshots that the tier lacks → the tier

A `PassageWriter` is a callable class, as `map_batches` of Ray Data and its like take them: each
worker loads the model once. The collection stays with one writer; where it adds the same documents
it finds their snapshots in the tier. Knows models, snapshots and the tier; no catalog.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, DocumentError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.pretrained.known import DEFAULT
from kvlink_rag.snapshots.remote import open_remote
from kvlink_rag.snapshots.sources import StoredSnapshots
from kvlink_rag.snapshots.store import SnapshotStore

from .passages import checked, encodable_by
from .storage import storage_for

Column = Sequence[Any]


class PassageWriter:
    """Encodes batches of passages into a tier.

        rows = ray.data.read_json("passages.jsonl")
        where = {"remote": "s3://bucket/snapshots?namespace=handbook", "codec": "bf16"}
        pool = ray.data.ActorPoolStrategy(size=8)
        rows.map_batches(PassageWriter, fn_constructor_kwargs=where, compute=pool).materialize()

    remote: the tier's URL, which names the namespace that the collection is opened with. model: as
    in `KVLinkRAG.open`. codec: that of the collection; None: as a new collection on this machine
    has it, so name it where machines differ. text, title: the columns of a batch; a batch without
    titles has passages without. Raises `ConfigError` for a tier without a namespace, or a model
    whose snapshots depend on their place in the prompt.
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
        title: str = "title",
    ) -> None:
        if "namespace=" not in remote:
            raise ConfigError(
                "found a tier without a namespace, which no collection is here to give; add "
                "?namespace=NAME to its URL, and open the collection with the same"
            )
        if not isinstance(model, KVLinkModel):
            model = KVLinkModel.from_pretrained(model or DEFAULT, device=device, dtype=dtype)
        if model.spec.rank == "exact":
            raise ConfigError(
                f"the snapshots of {model.name} depend on the passage's place in the prompt "
                "(rank: exact), so none can be encoded before its question"
            )
        self._model, self._text, self._title = model, text, title
        self._directory = Path(tempfile.mkdtemp(prefix="kvlink-writer-"))
        self._store = SnapshotStore(self._directory / "snapshots")
        self._tier = open_remote(remote, "", self._directory, self._store.file_of)
        self._snapshots = StoredSnapshots(
            self._store, model.encoder, codec=storage_for(model, {}, codec), remote=self._tier
        )

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, list[Any]]:
        """Encode what the tier lacks, and write it before this returns.

        batch: columns of equal length. Returns, for each row in order, `key` (of its snapshot),
        `tokens` and `encoded` (False where the tier had it, or an earlier row). Raises
        `DocumentError` and `PassageTooLong` for a row that is no passage, before any is encoded,
        and what the tier's client raises: such a batch is to be tried again, and encodes only what
        is still lacking.
        """
        passages = [
            encodable_by(self._model, self._snapshots, document)
            for document in self._documents(batch)
        ]
        rows = [passage.token_ids for passage in passages]
        keys = {passage.token_ids: passage.key for passage in passages}
        try:
            there = {ids for ids, _ in self._snapshots.from_remote(keys)}
            lacking = [ids for ids in keys if ids not in there]
            for index, snapshot in self._model.encoder.many(lacking):
                key = keys[lacking[index]]
                self._store.put(key, self._snapshots.storage.keep(snapshot))
                self._tier.write(key)
        finally:
            for key in keys.values():
                self._store.delete(key)
        return {
            "key": [keys[ids] for ids in rows],
            "tokens": [len(ids) for ids in rows],
            "encoded": [ids not in there and rows.index(ids) == n for n, ids in enumerate(rows)],
        }

    def close(self) -> None:
        """Release what is on this machine; what was written stays in the tier."""
        self._tier.close()
        self._store.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __del__(self) -> None:
        if hasattr(self, "_snapshots"):
            self.close()

    def _documents(self, batch: Mapping[str, Column]) -> list[Document]:
        if self._text not in batch:
            raise DocumentError(
                f"found no column {self._text!r}, but {', '.join(map(str, batch))}; give text=NAME"
            )
        texts = [str(each) for each in batch[self._text]]
        titles = [str(each or "") for each in batch.get(self._title, [""] * len(texts))]
        pairs = zip(texts, titles, strict=True)
        return [checked(Document(text, title=title)) for text, title in pairs]
