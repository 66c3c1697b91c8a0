"""The demonstration: the bundled documents indexed, questions answered, times and bytes shown.

Everything printed is measured in the run itself. Knows `KVLinkRAG` and the bundled files; `cli`
gives it a collection and a place to write.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvlink_rag.collection.answering import Answer
from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.disk.model_files import BUNDLED_DIRECTORY
from kvlink_rag.documents import Document, Part
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.snapshots.sources import Reuse
from kvlink_rag.training.questions import final_answer

from . import terminal

ASKED = {"one-hop": 4, "two-hop": 4, "absent": 2}  # questions of each kind
PASSAGES = 10
ROUNDS = 2  # a question does not say whether it needs a second round, so all get one
SHOWN = 3  # sources printed with an answer
LONG_PASSAGES, LONG_TOKENS = 20, 200  # the second timing: as many and as long as in real use

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Example:
    """A bundled question: its expected answer, and the ids of the documents it rests on."""

    question: str
    answer: str
    kind: str
    gold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds to the first token, medians; reuse reads its snapshots from the disk."""

    name: str
    passages: int
    tokens: int
    reuse_ms: float
    full_ms: float


def run(
    rag: KVLinkRAG, *, runs: int = 5, say: Say = print, data: Path = BUNDLED_DIRECTORY
) -> dict[str, Any]:
    """The whole demonstration; what it found, as JSON. Raises `ConfigError` without the files."""
    documents, examples = load_documents(data), load_examples(data)
    indexed = _index(rag, documents, say)
    answers = [_ask(rag, number, example, say) for number, example in enumerate(examples, 1)]
    right = sum(answer["right"] for answer in answers)
    say(f"\n{right} of {len(answers)} answers right.")
    timings = _time(rag, documents, examples[0], runs, say)
    return {
        "threads": torch.get_num_threads(),
        "indexed": indexed,
        "answers": answers,
        "right": right,
        "ttft": [asdict(timing) for timing in timings],
        "disk": _show_disk(rag, say),
    }


def load_documents(directory: Path) -> list[Document]:
    """The bundled documents."""
    return [Document(**row) for row in _rows(directory / "documents.jsonl")]


def load_examples(directory: Path) -> list[Example]:
    """The first questions of each kind, as many as `ASKED` says."""
    rows = [
        Example(**{**row, "gold": tuple(row["gold"])})
        for row in _rows(directory / "questions.jsonl")
    ]
    kinds = ([e for e in rows if e.kind == kind][:count] for kind, count in ASKED.items())
    return [example for examples in kinds for example in examples]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing; it is part of the package, or made by: make train-small"
        ) from error


# ── documents and questions ──────────────────────────────────────────────────────────────────


def _index(rag: KVLinkRAG, documents: Sequence[Document], say: Say) -> dict[str, Any]:
    say(f"Indexing {terminal.number(len(documents), 'document')} with {rag.model.name!r} …")
    start = time.perf_counter()
    report = rag.add(documents)
    seconds = time.perf_counter() - start
    say(
        f"  {report.encoded} snapshots of {report.tokens:,} tokens made in {seconds:.1f} s; "
        f"{report.unchanged} documents were there already"
    )
    return {"documents": len(documents), "tokens": report.tokens, "seconds": round(seconds, 3)}


def _ask(rag: KVLinkRAG, number: int, example: Example, say: Say) -> dict[str, Any]:
    answer = rag.ask(example.question, k=PASSAGES, rounds=ROUNDS, max_new_tokens=48)
    right = final_answer(answer.text) == final_answer(example.answer)
    say(f"\n{number}. {example.question}  ({example.kind})")
    verdict = "right" if right else f"WRONG, expected: {example.answer}"
    say(f"   {terminal.line(answer.text, 200)}  [{verdict}]")
    for line in _sources(answer, example):
        say(f"     {line}")
    cost = answer.trace
    say(
        f"     first token after {cost.first_token_ms:.1f} ms, retrieval included; "
        f"{cost.reused_tokens} tokens reused, {cost.computed_tokens} computed"
    )
    gold = [hit.document.id in example.gold for hit in answer.hits]
    return {
        **asdict(example),
        "said": answer.text,
        "right": right,
        "gold_retrieved": sum(gold),
        "trace": cost.to_dict(),
    }


def _sources(answer: Answer, example: Example) -> Iterable[str]:
    """The best hits, and further down those that the answer rests on, marked."""
    for rank, hit in enumerate(answer.hits, 1):
        gold = hit.document.id in example.gold
        if rank <= SHOWN or gold:
            text = terminal.line(hit.document.text, 90)
            yield f"{'→' if gold else ' '} [{rank}] {hit.score:.3f}  {text}"


# ── times ────────────────────────────────────────────────────────────────────────────────────


def _time(
    rag: KVLinkRAG, documents: Sequence[Document], example: Example, runs: int, say: Say
) -> list[Timing]:
    say(
        f"\nTime to first token, reuse beside full prefill of the same prompt: medians of {runs} "
        f"interleaved runs on {rag.model.backbone.device}, "
        f"{terminal.number(torch.get_num_threads(), 'thread')}; without retrieval"
    )
    hits = rag.search(example.question, PASSAGES, rounds=ROUNDS)
    own = rag.model.prompt([hit.document for hit in hits], example.question)
    timings = [_measure("question 1", rag.model, own, rag.reuse, runs)]
    with tempfile.TemporaryDirectory(prefix="kvlink-demo-") as directory:
        long = lengthened(rag.model, documents)
        with KVLinkRAG.open(directory, model=rag.model, embedder=rag.embedder) as other:
            other.register(long)
            parts = rag.model.prompt(long, example.question)
            timings.append(_measure("longer passages", rag.model, parts, other.reuse, runs))
    for each in timings:
        say(
            f"  {each.name:16} {each.passages:3} passages, {each.tokens:5,} tokens: reuse "
            f"{each.reuse_ms:7.1f} ms, full {each.full_ms:7.1f} ms "
            f"({each.full_ms / each.reuse_ms:.1f} times as long)"
        )
    return timings


def _measure(name: str, model: KVLinkModel, parts: list[Part], reuse: Reuse, runs: int) -> Timing:
    """Interleaved, after one run of each that does not count; nothing computed is kept."""
    reuse = replace(reuse, prefix=None)
    times: dict[str, list[float]] = {"reuse": [], "full": []}
    for count in range(runs + 1):
        for mode, taken in times.items():
            stream = model.stream(parts, max_new_tokens=1, mode=mode, reuse=reuse)  # type: ignore[arg-type]
            for _ in stream:
                pass
            taken += [stream.trace.first_token_ms] if count else []
    prompt = model.layout(parts)
    return Timing(
        name,
        len(prompt.passages),
        len(prompt),
        statistics.median(times["reuse"]),
        statistics.median(times["full"]),
    )


def lengthened(model: KVLinkModel, documents: Sequence[Document]) -> list[Document]:
    """Passages of about `LONG_TOKENS` tokens, of the documents' texts in turn."""
    texts = iter(document.text for document in [*documents] * 3)
    count = min(LONG_PASSAGES, model.spec.max_passages or LONG_PASSAGES)
    made = []
    for number in range(count):
        text = ""
        while len(model.tokenizer.encode(text)) < LONG_TOKENS - 10:
            text = f"{text} {next(texts)}".strip()
        made.append(Document(text, id=f"long-{number}"))
    return made


# ── bytes ────────────────────────────────────────────────────────────────────────────────────


def _show_disk(rag: KVLinkRAG, say: Say) -> dict[str, Any]:
    seen = rag.stats()
    rag.save_index()
    say(f"\nOn disk, in {rag.directory}:")
    sizes = {entry.name: _bytes(entry) for entry in sorted(rag.directory.iterdir())}
    for name, size in sizes.items():
        say(f"  {name:20} {terminal.size(size):>9}")
    say(
        f"  {terminal.number(seen.snapshots, 'snapshot')}, "
        f"{terminal.size(seen.bytes_per_token)} a token"
    )
    return {**sizes, "bytes_per_token": seen.bytes_per_token}


def _bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(os.path.getsize(name) for name in found)
