"""What all classes of this integration share: their collection's words.

A collection is opened on first use and once a process, so that the LLM, the retriever and the
ingestion of one application share one model and one index. `OnCollection` is the base of every
class, `CollectionFields` that of LlamaIndex's pydantic ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Union

from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.llms.kvlink import sources
from llama_index.llms.kvlink.errors import ArgumentError

from kvlink_rag.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_rag import KVLinkModel, KVLinkRAG
    from kvlink_rag.prompt.format import PromptFormat

ModelLike = Union["KVLinkModel", str, Path, None]
DirectoryLike = str | Path | None

# The collection opened last: without it, `KVLinkRegister()(nodes)` would load weights for itself.
_last: KVLinkRAG | None = None


class Words(TypedDict, total=False):
    """The words by which every class finds its collection; see `Collection`."""

    model: ModelLike
    embedder: Any
    directory: DirectoryLike
    device: str
    codec: str | None
    remote: str | None
    rag: KVLinkRAG | None


class Collection:
    """A collection that is opened when first used.

    model: a name, a directory or a `KVLinkModel`; embedder: a name, a directory, an embedder of
    kvlink_rag, of LlamaIndex or of LangChain; None: what the directory remembers, else the pair
    small. directory: None is the one that `kvlink-rag` uses on the command line. codec: how
    snapshots are kept, "exact", "bf16", "int8", "int4" or "fp8"; None: as the directory remembers,
    else "bf16" on a CPU, "exact" on a GPU. remote: a tier of snapshots that machines share; None:
    what KVLINK_REMOTE says. rag: an open collection instead of the other six.
    """

    def __init__(
        self,
        *,
        model: ModelLike = None,
        embedder: Any = None,
        directory: DirectoryLike = None,
        device: str = "auto",
        codec: str | None = None,
        remote: str | None = None,
        rag: KVLinkRAG | None = None,
    ) -> None:
        others = [v is not None for v in (model, embedder, directory, codec, remote)]
        if rag is not None and (any(others) or device != "auto"):
            raise ConfigError(
                "found rag and one of model, embedder, directory, device, codec, remote; give one"
            )
        if rag is not None and not hasattr(rag, "catalog"):
            raise ConfigError(f"rag is a {type(rag).__name__}, expected an open KVLinkRAG")
        self.model, self.embedder, self.directory, self.device = model, embedder, directory, device
        self.codec, self.remote = codec, remote
        self._given = self._rag = rag
        self._outline: PromptFormat | None = None
        self._lock = threading.Lock()

    def names(self) -> dict[str, str | None]:
        """The six as plain strings, for LlamaIndex's fields and its serialised form."""
        directory = self.directory if self._given is None else self._given.directory
        return {
            "model": _name(self.model),
            "embedder": _name(self.embedder),
            "directory": None if directory is None else str(directory),
            "device": self.device,
            "codec": self.codec,
            "remote": self.remote,
        }

    @property
    def opened(self) -> KVLinkRAG | None:
        """The collection, if it is open already."""
        return self._rag

    def rag(self) -> KVLinkRAG:
        """The open collection. Errors as in `KVLinkRAG.open`."""
        global _last
        from kvlink_rag.collection.opened import shared_collection

        with self._lock:
            if self._rag is None:
                _last = self._rag = shared_collection(
                    self.directory,
                    model=self.model,
                    embedder=_bare(self.embedder),
                    device=self.device,
                    codec=self.codec,
                    remote=self.remote,
                )
            return self._rag

    def outline(self) -> PromptFormat:
        """The model's window, tokenizer and spec, without its weights."""
        if self._outline is None:
            self._outline = self.rag().outline()
        return self._outline

    def __getstate__(self) -> dict[str, Any]:
        if not all(v is None or isinstance(v, str | Path) for v in (self.model, self.embedder)):
            raise ArgumentError(
                "found a model or embedder object, expected its name or directory to pickle"
            )
        return self.names()

    def __setstate__(self, state: dict[str, Any]) -> None:
        Collection.__init__(self, **state)


class OnCollection:
    """What stands on a collection, and can take nodes out of it again."""

    _collection: Collection

    @property
    def rag(self) -> KVLinkRAG:
        """The collection, opened at the first call. Errors as in `KVLinkRAG.open`."""
        return self._collection.rag()

    def delete_ref_doc(self, ref_doc_id: str) -> int:
        """Delete all nodes of a source document, and say how many.

        The counterpart of `delete_ref_doc` of an index or a docstore: call it beside that.
        """
        return sources.delete_ref_doc(self.rag, ref_doc_id)

    def delete_nodes(self, node_ids: Iterable[str]) -> int:
        """Delete nodes by id, and say how many; those that are not there are ignored."""
        return sources.delete_nodes(self.rag, node_ids)

    def sync(self, docstore: BaseDocumentStore) -> int:
        """Delete all nodes whose source document `docstore` no longer holds, and say how many.

        For a collection that holds nodes of that docstore's documents only, after a run of its
        pipeline, such as one with `DocstoreStrategy.UPSERTS_AND_DELETE`. Nodes without a source
        stay.
        """
        return sources.sync(self.rag, docstore)


class CollectionFields(OnCollection, BaseModel):
    """The six words as fields of a LlamaIndex component. Raises `ArgumentError` for others."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a tier's URL may hold a password

    model: str | None = Field(default=None, description="Name or directory of the model.")
    embedder: str | None = Field(default=None, description="Name or directory of the encoder.")
    directory: str | None = Field(default=None, description="Where the collection is kept.")
    device: str = Field(default="auto", description="Torch device.")
    codec: str | None = Field(default=None, description="How snapshots are kept.")
    remote: str | None = Field(
        default=None, exclude=True, repr=False, description="A tier that machines share."
    )

    _collection: Collection = PrivateAttr()

    def __init__(
        self,
        *,
        model: ModelLike = None,
        embedder: Any = None,
        directory: DirectoryLike = None,
        device: str = "auto",
        codec: str | None = None,
        remote: str | None = None,
        rag: KVLinkRAG | None = None,
        **fields: Any,
    ) -> None:
        if unknown := sorted(set(fields) - set(type(self).model_fields)):
            raise ArgumentError(f"{type(self).__name__} takes no argument {unknown[0]!r}")
        collection = Collection(
            model=model,
            embedder=embedder,
            directory=directory,
            device=device,
            codec=codec,
            remote=remote,
            rag=rag,
        )
        given = {name: value for name, value in fields.items() if value is not None}
        super().__init__(**collection.names(), **given)
        self._collection = collection


def _bare(embedder: Any) -> Any:
    """The encoder within a `ContrieverEmbedding`, so that its vectors and digest are its own."""
    own = getattr(embedder, "kvlink_embedder", None)
    return embedder if own is None else own()


def _name(value: Any) -> str | None:
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    return str(getattr(value, "name", None) or getattr(value, "model_name", type(value).__name__))
