"""`KVLinkVectorStore`: documents embedded, indexed and encoded in one go.

texts → ids, vectors, snapshots; question → vector → documents. The async methods are LangChain's
own, which work in a thread of the executor. Knows searches; knows no prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from kvlink_rag.arguments import check_count
from kvlink_rag.documents import Hit
from kvlink_rag.errors import ConfigError, DocumentError
from langchain_kvlink.collection import CollectionEmbeddings, CollectionFields
from langchain_kvlink.documents import from_passage, listed, to_passages
from langchain_kvlink.errors import UnknownArgument
from langchain_kvlink.filters import Filter, as_where, once

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from kvlink_rag import KVLinkRAG
    from langchain_kvlink.collection import EmbedderLike, Words

Vector = npt.NDArray[np.float32]


class KVLinkVectorStore(VectorStore):
    """A collection as a vector store. Whatever is added is encoded for the model as well.

        store = KVLinkVectorStore.from_texts(texts, directory="my-collection")
        retriever = store.as_retriever(search_kwargs={"k": 5})
        llm = ChatKVLink(directory="my-collection")

    model, embedder, directory, device, codec, remote: as everywhere in this package; None is the
    pair small and the directory of the `kvlink-rag` command line. `embedder` may be any LangChain
    `Embeddings`. rag: an open `kvlink_rag.KVLinkRAG` instead of these six. The collection is
    opened at the first call; the async methods open it in their thread too.

    A document's title is `metadata["title"]`; metadata must be JSON. Without an id a document gets
    one from its text and metadata, so that adding it again changes nothing. The same id with other
    content replaces. Ids that are random UUIDs, others each time a program runs, all stay, and a
    search finds one of the documents that differ in nothing else. filter: a mapping asks that
    metadata have these values, or with a list one of them (there are no operators), a function
    takes a `Document`; both are applied to the whole ranking, so that k are found where there are
    k. show_progress: a bar on stderr while documents are added.

    Scores are inner products, larger is nearer. Relevance is the score brought to [0, 1], in the
    same order: `(1 + score / most) / 2`, where `most` is the length of the question's vector times
    that of the nearest document's, filtered or not. So the nearest one has `(1 + cosine) / 2`, and
    where vectors have length 1 all have.

    Raises `kvlink_rag.errors.ConfigError` for a k that is no integer of at least 1 and for other
    filters, `DocumentError` for documents without text or with other metadata; both are
    `ValueError`.
    """

    def __init__(self, embedder: EmbedderLike = None, **words: Unpack[Words]) -> None:
        self._source = CollectionFields(embedder=embedder, **words)

    @property
    def collection(self) -> KVLinkRAG:
        """The collection, opened at the first call. Errors as in `KVLinkRAG.open`."""
        return self._source.collection

    @property
    def embeddings(self) -> Embeddings:
        """The embedder, loaded when first used."""
        given = self._source.embedder
        return given if isinstance(given, Embeddings) else CollectionEmbeddings(self._source)

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: EmbedderLike = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Self:
        """A store with `texts` added. embedding: another word for `embedder`; may be left out.

        What the directory holds already stays in the store.
        """
        if embedding is not None:
            kwargs["embedder"] = embedding
        store = cls(**kwargs)
        store.add_texts(texts, metadatas, ids=ids, show_progress=show_progress)
        return store

    @classmethod
    def from_documents(
        cls, documents: list[Document], embedding: EmbedderLike = None, **kwargs: Any
    ) -> Self:
        """A store with `documents` added. See `from_texts`."""
        added = {word: kwargs.pop(word) for word in ("ids", "show_progress") if word in kwargs}
        store = cls.from_texts([], embedding, **kwargs)
        store.add_documents(documents, **added)
        return store

    @classmethod
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: EmbedderLike = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """`from_texts` in a thread of the executor."""
        return await run_in_executor(
            None, cls.from_texts, texts, embedding, metadatas, ids=ids, **kwargs
        )

    @classmethod
    async def afrom_documents(
        cls, documents: list[Document], embedding: EmbedderLike = None, **kwargs: Any
    ) -> Self:
        """`from_documents` in a thread of the executor."""
        return await run_in_executor(None, cls.from_documents, documents, embedding, **kwargs)

    # Documents

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; their ids, in order. batch_size: accepted, the engine has batches of its own.

        Raises `DocumentError` where there are not as many metadatas or ids as texts, for a text
        that is no string and for metadata that is no mapping.
        """
        _refuse(kwargs)
        found = [texts] if isinstance(texts, str) else listed(texts, "texts")
        given = (
            [metadatas] if isinstance(metadatas, Mapping) else listed(metadatas or (), "metadatas")
        )
        given = given or [{} for _ in found]
        if len(given) != len(found):
            raise DocumentError(
                f"found {len(given)} metadatas for {len(found)} texts, expected as many"
            )
        documents = [_document(t, m) for t, m in zip(found, given, strict=True)]
        return self.add_documents(documents, ids=ids, show_progress=show_progress)

    def add_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Add documents; their ids, in order. `ids` go before those of the documents."""
        _refuse(kwargs)
        passages = to_passages(documents, ids)
        self.collection.add(passages, show_progress=show_progress)
        return [str(passage.id) for passage in passages]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Delete by id; None deletes all. Ids that are not there are ignored."""
        _refuse(kwargs)
        every = ids is None
        wanted = [str(d.id) for d in self.collection.documents()] if every else listed(ids, "ids")
        self.collection.delete(wanted, missing_ok=True)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Documents by id; those that are not there are left out."""
        return [
            from_passage(found)
            for found in self.collection.get(listed(ids, "ids"), missing_ok=True)
        ]

    # Searches

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The best `k` documents for `query`, best first."""
        return [d for d, _ in self.similarity_search_with_score(query, k, filter=filter, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The best `k` documents and their scores (inner products), best first."""
        _refuse(kwargs)
        return _scored(self.collection.search(query, k, where=once(as_where(filter))))

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The best `k` documents for a vector of this store's `embeddings`."""
        _refuse(kwargs)
        return [document for document, _ in _scored(self._nearest(embedding, k, filter))]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`k` of the best `fetch_k` documents that are near `query` and unlike one another."""
        return self.max_marginal_relevance_search_by_vector(
            self._embed(query), k, fetch_k, lambda_mult, filter=filter, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, for a vector of this store's `embeddings`.

        Carbonell and Goldstein 1998, as LangChain computes it, on cosines. lambda_mult: from 0,
        only unlike one another, to 1, only near.
        """
        _refuse(kwargs)
        check_count(k)
        check_count(fetch_k, "fetch_k")
        hits = self._nearest(embedding, max(k, fetch_k), filter)
        if not hits:
            return []
        chosen = maximal_marginal_relevance(
            _as_vector(embedding), list(self._vectors(hits)), lambda_mult=lambda_mult, k=k
        )
        return [from_passage(hits[i].document) for i in chosen]

    def _similarity_search_with_relevance_scores(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The best `k` documents by score, and their scores in [0, 1]; see the class."""
        _refuse(kwargs)
        embedding = self._embed(query)
        hits = self._nearest(embedding, k, filter)
        if not hits:
            return []
        nearest = hits[:1] if filter is None else self._nearest(embedding, 1, None)
        most = _length(_as_vector(embedding)) * _length(self._vectors(nearest)[0])
        return [(from_passage(hit.document), _relevance(hit.score, most)) for hit in hits]

    async def _asimilarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        return await run_in_executor(
            None, self._similarity_search_with_relevance_scores, query, k, **kwargs
        )

    def _embed(self, query: str) -> list[float]:
        return CollectionEmbeddings(self._source).embed_query(query)

    def _nearest(self, embedding: Sequence[float], k: int, filter: Filter | None) -> list[Hit]:
        where = once(as_where(filter))
        return self.collection.search_vector(_as_vector(embedding), k, where=where)

    def _vectors(self, hits: Sequence[Hit]) -> Vector:
        """The hits' vectors, float32 [hits, dimension]."""
        return self.collection.vectors([str(hit.document.id) for hit in hits])


def _scored(hits: Sequence[Hit]) -> list[tuple[Document, float]]:
    return [(from_passage(hit.document), hit.score) for hit in hits]


def _as_vector(embedding: Sequence[float]) -> Vector:
    try:
        return np.asarray(embedding, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the embedding is no list of numbers: {error}") from error


def _length(vector: Vector) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


def _relevance(score: float, most: float) -> float:
    """An inner product of -`most` to `most` as 0 to 1; those beyond are rounding, or far away."""
    return (1 + min(1.0, max(-1.0, score / max(most, 1e-12)))) / 2


def _document(text: str, metadata: Mapping[str, Any] | None) -> Document:
    """A document. Raises `DocumentError` for other types."""
    if not isinstance(text, str):
        raise DocumentError(f"found a {type(text).__name__} among the texts, expected strings")
    if not isinstance(metadata, Mapping | None):
        raise DocumentError(
            f"found a {type(metadata).__name__} among the metadatas, expected mappings"
        )
    return Document(page_content=text, metadata=dict(metadata or {}))


def _refuse(unknown: dict[str, Any]) -> None:
    """Raise `UnknownArgument` (a `TypeError`) for arguments that would otherwise do nothing."""
    if unknown:
        raise UnknownArgument(f"KVLinkVectorStore takes no argument {sorted(unknown)[0]!r} here")
