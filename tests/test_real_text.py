"""Retrieval over real passages: gold passages of Natural Questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvlink_rag import ContrieverEmbedder, Document, KVLinkRAG
from kvlink_rag.retrieval.rounds import embedded_text
from kvlink_rag.retrieval.vector_index import VectorIndex


@pytest.fixture(scope="module")
def questions(shared_data: Path) -> list[tuple[str, Document]]:
    """Each question with its gold passage."""
    lines = (shared_data / "nq_open_oracle.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        (row["question"], Document(row["ctxs"][0]["text"], row["ctxs"][0]["title"], id=str(i)))
        for i, row in enumerate(rows)
    ]


def test_real_passages_are_searched_as_by_hand(
    questions: list[tuple[str, Document]], saved_pair: tuple[Path, Path]
) -> None:
    """Every fifth of the 2,655 passages: hits are those of plain inner products."""
    assert len(questions) == 2655
    some = questions[::5]
    embedder = ContrieverEmbedder.from_pretrained(saved_pair[1], device="cpu")
    vectors = embedder.embed([embedded_text(document) for _, document in some])
    index = VectorIndex(embedder.dimension)
    index.add(np.arange(len(some)), vectors)
    queries = embedder.embed_queries([question for question, _ in some[::5]])
    hits = [index.search(query, 10) for query in queries]
    found = np.array([[row for row, _ in each] for each in hits])
    scores = queries @ vectors.T
    best = -np.sort(-scores, axis=1)[:, :10]
    np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1), best, rtol=1e-5)


def test_a_collection_of_real_passages_answers(
    tmp_path: Path, questions: list[tuple[str, Document]], saved_pair: tuple[Path, Path]
) -> None:
    """Real passages through the whole path; the answer equals the masked prefill's."""
    with KVLinkRAG.open(tmp_path, model=saved_pair[0], embedder=saved_pair[1]) as rag:
        report = rag.add([document for _, document in questions[:30]])
        assert report.encoded == len({d.canonical() for _, d in questions[:30]})
        answer = rag.ask(questions[0][0], k=5, max_new_tokens=16)
        assert answer.text.strip()
        assert answer.trace.snapshots_found == 5
        assert rag.verify(questions[0][0]).holds
        assert rag.check() == []
