"""Embedding objects of LangChain and LlamaIndex, as a collection asks for an embedder.

Goes by what an object can do, so that neither framework is imported; which encoder it is shows in
the vectors of a few probe texts. Knows texts and vectors.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from kvlink_rag.disk.forks import ForkSafeLock
from kvlink_rag.disk.loaded_weights import LoadedWeights, Look
from kvlink_rag.errors import ConfigError

from .embedder import Embedder, Vectors

# Collections remember the vectors of these; other texts need another setting to remember them in.
_PASSAGES = (
    "The lighthouse of Orvale was built in 1911 and has two lamps.",
    "Die Brücke über den Fluß kostet 3,50 € Maut; seit 2004 auch 日本語 und русский.",
    "def area(radius): return 3.14 * radius ** 2",
)
_QUESTIONS = ("When was the lighthouse of Orvale built?", "wer zahlt maut")
_SAME = 0.999  # cosine: APIs and other devices give the same text slightly other vectors

# Fields that say which encoder a wrapper stands for; what it lacks does not count.
_FIELDS = (
    *("model", "model_name", "model_id", "model_path", "repo_id", "revision", "engine", "name"),
    *("deployment", "deployment_name", "azure_deployment", "endpoint_name", "mode", "pooling"),
    *("dimensions", "dimension", "size", "embed_dim", "max_length"),
    *("query_instruction", "text_instruction", "embed_instruction"),
)


class LangChainEmbeddings(Protocol):
    """What is asked of LangChain's `Embeddings`."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages."""
        ...

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        ...


class LlamaIndexEmbedding(Protocol):
    """What is asked of LlamaIndex's `BaseEmbedding`."""

    def get_text_embedding_batch(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages."""
        ...

    def get_query_embedding(self, query: str) -> list[float]:
        """The vector of a question."""
        ...


AnyEmbedder = Embedder | LangChainEmbeddings | LlamaIndexEmbedding


class ForeignEmbedder:
    """An `Embedder` over two functions: of many passages, and of one question.

    Vectors are scaled to length 1, so that the inner product is the cosine whatever the encoder.
    source: the object they belong to. Use `as_embedder`.
    """

    def __init__(
        self,
        source: object,
        passages: Callable[[list[str]], Iterable[Sequence[float]]],
        question: Callable[[str], Sequence[float]],
    ) -> None:
        self.source, self._passages, self._question = source, passages, question
        self._lock = ForkSafeLock()
        self._watched: list[LoadedWeights] = []
        self._probed: tuple[list[Look], Vectors] | None = None

    @property
    def name(self) -> str:
        """Class and model, for people."""
        facts = _facts(self.source)
        model = next((facts[k] for k in ("model_name", "model", "model_id") if k in facts), None)
        kind = type(self.source).__name__
        return f"{kind} {model}" if isinstance(model, str) else kind

    @cached_property
    def dimension(self) -> int:
        """Length of a vector; asks the encoder once."""
        return int(self.probes().shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the path of the class and the fields that name a model.

        It cannot see weights; `probes` do.
        """
        kind = type(self.source)
        facts = [kind.__module__, kind.__qualname__, _facts(self.source)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def probes(self) -> Vectors:
        """What this encoder computes: vectors of a few passages and questions, of length 1.

        float32 [texts, dimension]. Asks the encoder once, and again where a torch module that the
        object holds looks otherwise than it did then.
        """
        with self._lock:
            looks = self._looks()
            if self._probed is None or self._probed[0] != looks:
                vectors = [self.embed(_PASSAGES), self.embed_queries(_QUESTIONS)]
                self._probed = looks, np.concatenate(vectors)
            return self._probed[1]

    def _looks(self) -> list[Look]:
        modules = list(_modules(self.source))
        if [id(weights.module) for weights in self._watched] != [id(m) for m in modules]:
            self._watched = [LoadedWeights(module) for module in modules]
        return [weights.look() for weights in self._watched]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of passages: float32 [texts, dimension], in order, of length 1."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return self._vectors(self._passages(list(texts)), len(texts))

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of questions: float32 [texts, dimension], in order, of length 1."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return self._vectors([self._question(text) for text in texts], len(texts))

    def _vectors(self, found: Iterable[Sequence[float]], count: int) -> Vectors:
        """Validated and scaled. Raises `ConfigError`."""
        try:
            vectors = np.array(list(found), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.name} gave vectors that are not numbers: {error}") from error
        if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
            shape = list(vectors.shape)
            raise ConfigError(f"{self.name} gave vectors {shape}, expected [{count}, dimension]")
        if not np.isfinite(vectors).all():
            raise ConfigError(f"{self.name} gave a vector that is not finite")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        scaled: Vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        return scaled


def same_vectors(found: Vectors, expected: Vectors) -> bool:
    """Whether rows of length 1 (or 0) are the same but for what one encoder varies by."""
    if found.shape != expected.shape:
        return False
    cosines = (found * expected).sum(axis=1)
    empty = ~found.any(axis=1) & ~expected.any(axis=1)
    return bool((empty | (cosines > _SAME)).all())


def as_embedder(found: Any) -> Embedder:
    """`found` itself where it is an `Embedder`, else an adapter over it.

    Takes LangChain's `Embeddings` (`embed_documents`, `embed_query`) and LlamaIndex's
    `BaseEmbedding` (`get_text_embedding_batch`, `get_query_embedding`). Raises `ConfigError`.
    """
    own_print = inspect.getattr_static(found, "fingerprint", None)  # computing it takes time
    if own_print is not None and _has(found, "embed", "embed_queries"):
        own: Embedder = found
        return own
    if _has(found, "embed_documents", "embed_query"):
        return ForeignEmbedder(found, found.embed_documents, found.embed_query)
    if _has(found, "get_text_embedding_batch", "get_query_embedding"):
        return ForeignEmbedder(found, found.get_text_embedding_batch, found.get_query_embedding)
    raise ConfigError(
        f"found {type(found).__name__} as embedder, expected a name, a directory, a kvlink_rag "
        "Embedder, LangChain Embeddings or a LlamaIndex BaseEmbedding"
    )


def _has(found: Any, *methods: str) -> bool:
    is_object = not isinstance(found, type)
    return is_object and all(callable(getattr(found, method, None)) for method in methods)


def _modules(source: object) -> Iterator[torch.nn.Module]:
    """The torch modules among the fields of `source`, and among those of what it holds."""
    for held in _fields(source):
        if isinstance(held, torch.nn.Module):
            yield held
        else:
            yield from (m for m in _fields(held) if isinstance(m, torch.nn.Module))


def _fields(holder: object) -> list[object]:
    """Values of the fields of an object, pydantic's private ones too; of a class none."""
    found = [getattr(holder, name, None) for name in ("__dict__", "__pydantic_private__")]
    return [value for fields in found if isinstance(fields, dict) for value in fields.values()]


def _facts(source: object) -> dict[str, Any]:
    """The plain values among the fields that name a model."""
    values = {name: getattr(source, name, None) for name in _FIELDS}
    return {name: value for name, value in values.items() if isinstance(value, str | int)}
