"""What all classes share: `model`, `embedder`, `directory`, `device`, `codec`, `remote`, or `rag`.

A collection is opened on first use and once a process, so that the store, the retriever and the
LLM of one application share one model and one index. Knows no prompts and no searches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from kvlink_rag.errors import ConfigError
from langchain_kvlink.embeddings import ContrieverEmbeddings, as_lists, checked_texts

if TYPE_CHECKING:
    from typing_extensions import Self

    from kvlink_rag import KVLinkModel, KVLinkRAG
    from kvlink_rag.retrieval.framework_embedders import AnyEmbedder

    ModelLike: TypeAlias = KVLinkModel | str | Path | None
    EmbedderLike: TypeAlias = AnyEmbedder | ContrieverEmbeddings | str | Path | None
    RagLike: TypeAlias = KVLinkRAG | None
else:  # these classes import torch, which pydantic must not need to see this module's fields
    ModelLike = EmbedderLike = RagLike = Any

# The collection opened last stays open: an object that LangChain makes anew for every call
# (`configurable_fields`) must not load the weights every time.
_last: RagLike = None


class HasCollection(Protocol):
    """Whatever stands on a collection."""

    @property
    def collection(self) -> KVLinkRAG:
        """The open collection."""
        ...


class Words(TypedDict, total=False):
    """The words by which a class finds its collection, besides `embedder`; see the fields below."""

    model: ModelLike
    directory: str | Path | None
    device: str
    codec: str | None
    remote: str | None
    rag: RagLike


class CollectionFields(BaseModel):
    """The fields by which a class finds its collection; `collection` opens it."""

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        extra="forbid",
        hide_input_in_errors=True,  # a tier's URL may hold a password
    )

    model: ModelLike = None
    """Name, directory or `kvlink_rag.KVLinkModel`; None: what the directory remembers, else the
    reader of the pair small."""
    embedder: EmbedderLike = None
    """Name, directory, or embedding object of LangChain or kvlink_rag; None: what the directory
    remembers, else the encoder of the pair small."""
    directory: str | Path | None = None
    """Where the collection is kept; None: the one of the `kvlink-rag` command line, in
    `KVLINK_CACHE_DIR` or the user's cache folder."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ..."""
    codec: str | None = None
    """How snapshots are kept: "exact", "bf16", "int8", "int4" or "fp8"; None: as the directory
    remembers, else "bf16" on a CPU, "exact" on a GPU."""
    remote: str | None = Field(default=None, exclude=True, repr=False)
    """A tier of snapshots that machines share, such as "redis://…"; may hold a password, so it is
    neither shown nor serialised. None: what KVLINK_REMOTE says, "" for none."""
    rag: RagLike = Field(default=None, exclude=True, repr=False)
    """An open `kvlink_rag.KVLinkRAG` instead of the six above."""

    _opened: RagLike = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        words = (self.model, self.embedder, self.directory, self.codec, self.remote)
        named = self.device != "auto" or any(word is not None for word in words)
        if self.rag is not None and not hasattr(self.rag, "catalog"):
            raise ConfigError(f"rag is a {type(self.rag).__name__}, expected an open KVLinkRAG")
        if self.rag is not None and named:
            raise ConfigError(
                "found rag= and one of model=, embedder=, directory=, device=, codec=, remote=; an "
                "open collection has them already, so give rag= alone"
            )
        return self

    @property
    def collection(self) -> KVLinkRAG:
        """The collection, opened at the first call. Errors as in `KVLinkRAG.open`."""
        if self.rag is not None:  # an empty collection is false
            return self.rag
        if self._opened is None:  # of two threads here, both get the same object
            self._opened = self._open()
        return self._opened

    def _open(self) -> KVLinkRAG:
        """The collection in `directory`, the same object for all who ask for it in this process."""
        global _last
        from kvlink_rag.collection.opened import shared_collection

        embedder = self.embedder
        if isinstance(embedder, ContrieverEmbeddings):
            embedder = embedder.encoder()
        _last = shared_collection(
            self.directory,
            model=self.model,
            embedder=embedder,
            device=self.device,
            codec=self.codec,
            remote=self.remote,
        )
        return _last


class CollectionEmbeddings(Embeddings):
    """The embedder of a collection, as LangChain has it; opened and loaded when first used."""

    def __init__(self, source: HasCollection) -> None:
        self._source = source

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages, in order."""
        return as_lists(self._source.collection.embedder.embed(checked_texts(texts)))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        checked = checked_texts([text])
        return as_lists(self._source.collection.embedder.embed_queries(checked))[0]


def named(value: Any) -> str | None:
    """The name of a model or embedder, for people and traces."""
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    return str(getattr(value, "name", type(value).__name__))
