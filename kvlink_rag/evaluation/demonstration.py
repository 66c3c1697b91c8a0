"""The demonstration: real text indexed, questions answered, both ways to the first token timed.

Everything printed is measured in the run itself. Knows `KVLinkRAG` and the passages that come with
the package; who runs it gives it a collection and a place to write.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from kvlink_rag.arguments import Mode
from kvlink_rag.collection.answering import Answer
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.datasets.countries import SOURCE, Question, passages, questions
from kvlink_rag.quantities import number, size

PASSAGES = 10
ANSWER_TOKENS = 32
SHOWN = 1  # sources printed with an answer, besides those that hold it

Say = Callable[[str], object]


def run(rag: KVLinkRAG, *, say: Say = print) -> dict[str, Any]:
    """The whole demonstration; what it found, as JSON."""
    indexed = _index(rag, say)
    answers = [_ask(rag, place, asked, say) for place, asked in enumerate(questions(), 1)]
    right = sum(answer["right"] for answer in answers)
    say(f"\n{right} of {len(answers)} answers right, by the expected ones.")
    return {
        "model": rag.model_name,
        "threads": torch.get_num_threads(),
        "indexed": indexed,
        "answers": answers,
        "right": right,
        "ttft": _show_times(rag, answers, say),
        "disk": _show_disk(rag, say),
    }


def _index(rag: KVLinkRAG, say: Say) -> dict[str, Any]:
    documents = passages()
    say(
        f"Indexing {number(len(documents), 'passage')} of {SOURCE} (public domain) "
        f"with {rag.model_name!r} …"
    )
    start = time.perf_counter()
    report = rag.add(documents)
    seconds = time.perf_counter() - start
    say(
        f"  {number(report.encoded, 'snapshot')} of {report.tokens:,} tokens made in "
        f"{seconds:.1f} s; {report.unchanged} were there already"
    )
    return {"passages": len(documents), "tokens": report.tokens, "seconds": round(seconds, 3)}


def _ask(rag: KVLinkRAG, place: int, asked: Question, say: Say) -> dict[str, Any]:
    say(f"\n{place}. {asked.question}")
    answer = rag.ask(asked.question, k=PASSAGES, max_new_tokens=ANSWER_TOKENS)
    right = asked.is_right(answer.text)
    expected = " or ".join(asked.answers) or "that the documents do not say"
    verdict = "right" if right else f"WRONG, expected: {expected}"
    said = shorten(answer.text, 160, placeholder="…")
    say(f"   {said}  [{verdict}]")
    for source in _sources(answer, asked):
        say(f"     {source}")
    full_ms = _first_token_ms(rag, asked.question, "full")
    cost = answer.trace
    reuse_ms = cost.first_token_ms
    say(
        f"     first token: reuse {reuse_ms:,.0f} ms, full prefill {full_ms:,.0f} ms; "
        f"{cost.reused_tokens:,} tokens reused, {cost.computed_tokens:,} computed"
    )
    return {
        **asdict(asked),
        "said": answer.text,
        "right": right,
        "gold_retrieved": sum(hit.document.id in asked.gold for hit in answer.hits),
        "ttft": {"reuse_ms": reuse_ms, "full_ms": full_ms},
        "trace": cost.to_dict(),
    }


def _sources(answer: Answer, asked: Question) -> Iterator[str]:
    """The best hit, and those that hold the answer, marked."""
    for rank, hit in enumerate(answer.hits, 1):
        gold = hit.document.id in asked.gold
        if rank <= SHOWN or gold:
            text = shorten(f"{hit.document.title}: {hit.document.text}", 90, placeholder="…")
            yield f"{'→' if gold else ' '} [{rank}] {text}"


def _first_token_ms(rag: KVLinkRAG, question: str, mode: Mode) -> float:
    """Retrieval to first token, as `mode` computes the same prompt."""
    stream = rag.stream(question, k=PASSAGES, mode=mode, max_new_tokens=1)
    for _ in stream:
        pass
    return stream.trace.first_token_ms


def _show_times(rag: KVLinkRAG, answers: list[dict[str, Any]], say: Say) -> dict[str, float]:
    """Medians over the questions."""
    medians = {
        way: statistics.median(answer["ttft"][way] for answer in answers)
        for way in ("reuse_ms", "full_ms")
    }
    say(
        f"Time to first token, retrieval included, median of {len(answers)} questions on "
        f"{rag.model.backbone.device}, {number(torch.get_num_threads(), 'thread')}: reuse "
        f"{medians['reuse_ms']:,.0f} ms, full prefill {medians['full_ms']:,.0f} ms "
        f"({medians['full_ms'] / medians['reuse_ms']:.1f} times as long)"
    )
    return medians


def _show_disk(rag: KVLinkRAG, say: Say) -> dict[str, Any]:
    seen = rag.stats()
    rag.save_index()
    say(f"\nOn disk, in {rag.directory}:")
    sizes = {entry.name: _bytes(entry) for entry in sorted(rag.directory.iterdir())}
    for name, count in sizes.items():
        say(f"  {name:20} {size(count):>9}")
    say(f"  {number(seen.snapshots, 'snapshot')}, {size(seen.bytes_per_token)} a token")
    return {**sizes, "bytes_per_token": seen.bytes_per_token}


def _bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(os.path.getsize(name) for name in found)
