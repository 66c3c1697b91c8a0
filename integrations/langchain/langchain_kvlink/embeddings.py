"""`ContrieverEmbeddings`: Contriever, or another encoder, for any LangChain vector store.

Knows texts and vectors; knows no collection.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict, PrivateAttr

from kvlink_rag.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_rag import Embedder

    EncoderLike: TypeAlias = Embedder | str | Path | None
else:
    EncoderLike = Any


_loading = threading.Lock()


class ContrieverEmbeddings(BaseModel, Embeddings):
    """Vectors of texts, compared by inner product; Contriever's are not of length 1.

    embedder: a name, a directory (whose files say how it pools, else by the mean) or a `kvlink_rag`
    embedder; None: that of the pair small.
    device: as everywhere in this package. The encoder is loaded at the first call. Calls from any
    number of threads are safe; the async methods work in a thread of the executor.

        ContrieverEmbeddings(embedder="facebook/contriever").embed_query("When was it built?")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    embedder: EncoderLike = None
    device: str = "auto"

    _encoder: Any = PrivateAttr(default=None)

    def encoder(self) -> Embedder:
        """The encoder, loaded at the first call. Raises `kvlink_rag.errors.ConfigError`."""
        from kvlink_rag import load_embedder

        with _loading:
            if self._encoder is None:
                asked = "small" if self.embedder is None else self.embedder
                self._encoder = (
                    load_embedder(asked, device=self.device)
                    if isinstance(asked, str | Path)
                    else asked
                )
            encoder: Embedder = self._encoder
            return encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages, in order."""
        return as_lists(self.encoder().embed(checked_texts(texts)))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        return as_lists(self.encoder().embed_queries(checked_texts([text])))[0]


def checked_texts(texts: list[str]) -> list[str]:
    """`texts`. Raises `ConfigError` for one string, of which each letter would be a text, and for
    what is no string."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ConfigError(
            f"found one {type(texts).__name__}, expected a list of strings; use [text]"
        )
    found = list(texts)
    if odd := [text for text in found if not isinstance(text, str)]:
        raise ConfigError(f"found {odd[0]!r:.80} among the texts, expected strings")
    return found


def as_lists(vectors: Any) -> list[list[float]]:
    """float32 [n, dimension] as lists."""
    rows: list[list[float]] = vectors.tolist()
    return rows
