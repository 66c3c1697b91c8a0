"""Documents from our own retriever instead of the data set's, and how often they are the gold ones.

The KVLink paper always hands the gold documents over; this measures what an application meets.
Knows an embedder and the vector index; no model and no prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kvlink_rag.datasets.answers import contained
from kvlink_rag.datasets.rows import Row, Source, rows
from kvlink_rag.datasets.schemas import Example
from kvlink_rag.datasets.sets import Skipped
from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, DocumentError, ExampleError
from kvlink_rag.retrieval.contriever import Embedder
from kvlink_rag.retrieval.rounds import embedded_text
from kvlink_rag.retrieval.vector_index import VectorIndex

BATCH = 256


def read_corpus(source: Source, skipped: Skipped) -> Iterator[Document]:
    """Passages of a corpus: rows with `text` (or `contents`) and, if any, `title` and `id`."""
    for number, row in enumerate(rows(source)):
        try:
            yield _passage(row)
        except (ExampleError, DocumentError) as error:
            skipped("corpus row", ExampleError(f"{source}, row {number}: {error}"))


def _passage(row: Row | ExampleError) -> Document:
    if isinstance(row, ExampleError):
        raise row
    text = row.get("text", row.get("contents"))
    if not isinstance(text, str) or not text.strip():
        raise ExampleError(f"no usable column 'text'; found {', '.join(sorted(row))}")
    return Document(text, title=row.get("title") or "")


class Corpus:
    """Passages that can be searched. Raises `ConfigError` where there are none."""

    def __init__(self, documents: Iterable[Document], embedder: Embedder) -> None:
        self.documents = list(dict.fromkeys(documents))
        if not self.documents:
            raise ConfigError("the corpus holds no passages; give --corpus a file with some")
        self._embedder = embedder
        self._index = VectorIndex(embedder.dimension)
        for start in range(0, len(self.documents), BATCH):
            batch = self.documents[start : start + BATCH]
            vectors = embedder.embed([embedded_text(document) for document in batch])
            self._index.add(np.arange(start, start + len(batch)), vectors)

    def ask(self, examples: Sequence[Example], k: int) -> list[tuple[Example, float]]:
        """Each example over its first k hits, and its recall (see `recall`)."""
        found = []
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            queries = self._embedder.embed_queries([example.question for example in batch])
            for example, query in zip(batch, queries, strict=True):
                hits = [self.documents[row] for row, _ in self._index.search(query, k)]
                found.append(_over(example, hits))
        return found


def _over(example: Example, hits: Sequence[Document]) -> tuple[Example, float]:
    wanted = {example.documents[i] for i in example.gold}
    gold = [i for i, document in enumerate(hits) if document in wanted]
    return example.with_documents(hits, gold), recall(example, hits)


def recall(example: Example, hits: Sequence[Document]) -> float:
    """The share of the example's gold documents among `hits`.

    Where the data set names none: 1 if a hit holds an answer, else 0.
    """
    wanted = {example.documents[i] for i in example.gold}
    if wanted:
        return len(wanted & set(hits)) / len(wanted)
    return float(any(contained(hit.text, example.answers) for hit in hits))
