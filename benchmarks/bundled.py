"""What the bundled small pair answers, through stored snapshots and through its own retriever.

    python benchmarks/bundled.py --n 1000

    given      held-out questions about unseen names, each over ten passages that hold the gold ones
               among others of the same type; every passage comes from a stored snapshot
    retrieved  held-out questions asked of a collection of `--pages` passages: `KVLinkRAG.ask` with
               k = 10, two-hop questions in two rounds

The final answer is scored by exact match (`kvlink_rag.datasets.answers.final_answer`). The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from shapes import machine

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.training.evaluate_small import held_out, right
from kvlink_rag.training.formats import document
from kvlink_rag.training.questions import Question, one_hop, two_hop, two_hop_facts
from kvlink_rag.training.retriever import large_world

K = 10


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        given = over_given_passages(arguments, f"{directory}/given")
        print(json.dumps({"given": given}), flush=True)
        retrieved = over_retrieved_passages(arguments, f"{directory}/retrieved")
    print(json.dumps({"machine": machine(), "given": given, "retrieved": retrieved}))


def over_given_passages(arguments: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Exact match by kind; refuses to go on where a passage was not read from the store."""
    asked = list(held_out(arguments.n, k=K, seed=arguments.seed))
    pages = {page.id: document(page) for each in asked for page in each.pages}
    hits: dict[str, list[bool]] = defaultdict(list)
    with KVLinkRAG.open(directory) as rag:
        rag.register(list(pages.values()), show_progress=True)
        for each in asked:
            documents = [pages[page.id] for page in each.pages]
            parts = rag.model.prompt(documents, each.question.text)
            stream = rag.model.stream(parts, reuse=rag.reuse, max_new_tokens=64)
            text = "".join(stream)
            if stream.trace.snapshots_found != len(documents):
                raise SystemExit(f"no figures: a passage was not stored ({stream.trace})")
            hits[each.question.kind].append(right(each.question, text))
    return {kind: share(found) for kind, found in hits.items()}


def over_retrieved_passages(arguments: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Recall and exact match of questions that find their own passages."""
    rng = random.Random(f"retrieved-{arguments.seed}")
    world = large_world(rng, "heldout", arguments.pages)
    facts = [fact for fact, _ in world.stated.values()]
    hops = list(two_hop_facts(world))
    ones = (one_hop(world, rng.choice(facts), rng) for _ in range(arguments.n // 2))
    twos = (two_hop(world, *rng.choice(hops), rng) for _ in range(arguments.n // 4))
    with KVLinkRAG.open(directory) as rag:
        rag.add([document(page) for page in world.pages.values()], show_progress=True)
        return {
            "passages": len(rag),
            "one-hop": ask_all(rag, ones, rounds=1, found=lambda ids, q: q.gold[0] in ids),
            "two-hop": ask_all(rag, twos, rounds=2, found=lambda ids, q: set(q.gold) <= ids),
        }


def ask_all(
    rag: KVLinkRAG,
    questions: Iterable[Question],
    *,
    rounds: int,
    found: Callable[[set[str], Question], bool],
) -> dict[str, Any]:
    recalled, hits = [], []
    for question in questions:
        answer = rag.ask(question.text, k=K, rounds=rounds, max_new_tokens=64)
        documents: list[Document] = [hit.document for hit in answer.hits]
        recalled.append(found({str(d.id) for d in documents}, question))
        hits.append(right(question, answer.text))
    return {"recall_at_10": share(recalled), "exact_match": share(hits)}


def share(found: list[bool]) -> dict[str, float]:
    return {"share": round(sum(found) / len(found), 4), "questions": len(found)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--pages", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
