"""`ContrieverEmbedding`: the encoder of kvlink_rag for LlamaIndex's own indexes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.llms.kvlink.errors import ArgumentError

if TYPE_CHECKING:
    from kvlink_rag import Embedder

DEFAULT = "small"


class ContrieverEmbedding(BaseEmbedding):
    """Vectors of Contriever (Izacard et al., arXiv 2112.09118), made on this machine.

    Args:
        embedder: name (such as "facebook/contriever"), directory (whose files say how it pools,
            else by the mean), or a `kvlink_rag` embedder; None: the encoder of the pair
            small.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        embed_batch_size: texts handed over at once.

    The encoder is loaded at the first call; calls from any number of threads are safe. Contriever
    compares by inner product; LlamaIndex's default store compares by cosine, which ranks alike for
    vectors of similar length.

    """

    embedder: str | None = Field(default=None, description="Name or directory of the encoder.")
    device: str = Field(default="auto", description="Torch device.")

    _source: Any = PrivateAttr()
    _lock: Any = PrivateAttr()

    def __init__(
        self,
        embedder: Embedder | str | Path | None = None,
        *,
        device: str = "auto",
        embed_batch_size: int = 32,
        callback_manager: CallbackManager | None = None,
        **embedding_fields: Any,
    ) -> None:
        named = embedding_fields.pop("model_name", None)
        if unknown := sorted(set(embedding_fields) - set(type(self).model_fields)):
            raise ArgumentError(f"ContrieverEmbedding takes no argument {unknown[0]!r}")
        if embedder is None and named not in (None, DEFAULT):
            embedder = str(named)
        name = None if embedder is None else _name(embedder)
        ours: dict[str, Any] = {"embedder": name, "device": device, "model_name": name or DEFAULT}
        super().__init__(
            embed_batch_size=embed_batch_size,
            callback_manager=callback_manager or CallbackManager([]),
            **ours,
            **embedding_fields,
        )
        self._source, self._lock = embedder, threading.Lock()

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "ContrieverEmbedding"

    def kvlink_embedder(self) -> Embedder:
        """The encoder, loaded; what `embedder=` of the other classes uses of this object."""
        from kvlink_rag import load_embedder

        with self._lock:
            if self._source is None or isinstance(self._source, str | Path):
                self._source = load_embedder(self._source or DEFAULT, device=self.device)
            encoder: Embedder = self._source
            return encoder

    def _get_query_embedding(self, query: str) -> list[float]:
        return _lists(self.kvlink_embedder().embed_queries([query]))[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return _lists(self.kvlink_embedder().embed(texts))

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


def _name(embedder: Any) -> str:
    if isinstance(embedder, str | Path):
        return str(embedder)
    return str(getattr(embedder, "name", type(embedder).__name__))


def _lists(vectors: Any) -> list[list[float]]:
    found: list[list[float]] = vectors.tolist()
    return found
