"""Question to hits: one round, or two for questions whose second fact the question does not name.

The second round asks again with the question and each of the best first hits together, as in
multi-hop dense retrieval (Xiong et al., arXiv 2009.12756). Knows texts and scores; knows neither
FAISS nor SQLite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvlink_rag.arguments import check_count, check_order
from kvlink_rag.documents import Document, Hit
from kvlink_rag.errors import ConfigError

FIRST_HITS = 3  # best hits of round one that round two starts from

SearchMany = Callable[[Sequence[str], int], list[list[Hit]]]
Where = Callable[[Document], bool]


def retrieve(search: SearchMany, question: str, k: int, rounds: int = 1) -> list[Hit]:
    """The best `k` hits for `question`, best first, no document twice.

    rounds: 1, or 2 for two-hop questions: then half of the hits may come from the second round.
    Raises `ConfigError` for other numbers.
    """
    check_count(k)
    if not isinstance(question, str):
        raise ConfigError(f"the question is {question!r}, expected a str")
    if rounds not in (1, 2):
        raise ConfigError(f"rounds is {rounds}, expected 1 or 2")
    first = search([question], k)[0]
    if rounds == 1 or not first:
        return first
    seeds = first[:FIRST_HITS]
    second = search([followed(question, hit.document) for hit in seeds], k)
    return merge(first, seeds, second, k)


def in_order(hits: Sequence[Hit], order: str) -> list[Hit]:
    """The same hits, "score": as they are, best first; "id": by their document's id.

    By id, questions that find the same documents share a longer beginning of the prompt, and so
    more of the kept runs. Raises `ConfigError` for another order.
    """
    if check_order(order) == "score":
        return list(hits)
    return sorted(hits, key=lambda hit: str(hit.document.id))


def embedded_text(document: Document) -> str:
    """What the embedder reads: title and text, as Contriever was used in the paper."""
    return f"{document.title} {document.text}" if document.title else document.text


def followed(question: str, document: Document) -> str:
    """The query of the second round: the question, then what the first round found."""
    return f"{question} {document.title} {document.text}"


def merge(
    first: Sequence[Hit], seeds: Sequence[Hit], second: Sequence[Sequence[Hit]], k: int
) -> list[Hit]:
    """Half of `k` from the first round, the rest by the scores of question → seed → hit."""
    kept = {hit.document.id: hit for hit in first[: max(1, k - k // 2)]}
    paths = [
        Hit(hit.document, (seed.score + hit.score) / 2)
        for seed, hits in zip(seeds, second, strict=True)
        for hit in hits
        if hit.document.id != seed.document.id  # a seed always finds itself
    ]
    for hit in sorted(paths, key=lambda hit: -hit.score):
        if len(kept) >= k:
            break
        kept.setdefault(hit.document.id, hit)
    for hit in first:
        if len(kept) < k:
            kept.setdefault(hit.document.id, hit)
    return list(kept.values())
