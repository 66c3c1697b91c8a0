"""A plan against what indexing the same files then takes, on the disk."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import KVLinkRAG
from kvlink_rag.ingest.estimate import SAMPLE, Plan, plan
from kvlink_rag.ingest.index_files import ingest
from kvlink_rag.ingest.readers import SourceFile, find

WORDS = ["harbour", "tin", "crane", "Orvale", "seat", "of", "the", "company", "built", "was"]


def write(folder: Path, files: int, seed: int = 0) -> list[SourceFile]:
    """Files of some hundred words, and two passages that share a snapshot."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(files):
        text = " ".join(rng.choices(WORDS, k=rng.randint(5, 150)))
        (folder / f"{number}.txt").write_text(f"{number}: {text}.")
    lines = [f'{{"text": "A crane.", "id": "{id}"}}' for id in "ab"]
    (folder / "twice.jsonl").write_text("\n".join(lines))
    return find([str(folder)], fail)


def fail(problem: Any) -> None:
    raise AssertionError(problem)


def bytes_in(directory: Path) -> int:
    walk = ((folder, names) for folder, _, names in os.walk(directory))
    return sum(os.path.getsize(os.path.join(folder, n)) for folder, names in walk for n in names)


@pytest.fixture
def opener(make_model: ModelMaker) -> Callable[[str], Callable[[Path], KVLinkRAG]]:
    model = make_model("llama", torch.float32)

    def make(codec: str) -> Callable[[Path], KVLinkRAG]:
        return lambda path: KVLinkRAG.open(path, model=model, embedder=WordEmbedder(), codec=codec)

    return make


@pytest.mark.parametrize(
    ("codec", "files"), [("fp8", 0), ("int8", 3), ("bf16", 3), ("exact", 40), ("int4", 40)]
)
def test_a_plan_is_what_index_takes(opener: Any, tmp_path: Path, codec: str, files: int) -> None:
    """Counts and snapshot bytes exactly, all bytes within a tenth; also beyond the sample."""
    sources = write(tmp_path / "docs", files)
    made: Plan = plan(sources, opener(codec), on_problem=fail, max_tokens=120)
    with opener(codec)(tmp_path / "c") as rag:
        report = ingest(rag, sources, on_problem=fail, max_tokens=120)
        seen = rag.stats()
    assert made.passages == report.passages > made.snapshots == seen.snapshots == report.encoded
    assert made.tokens == report.tokens
    assert (made.files, made.documents, made.codec) == (files + 1, files + 2, codec)
    assert made.snapshot_bytes == seen.snapshot_bytes
    assert made.total_bytes == pytest.approx(bytes_in(tmp_path / "c"), rel=0.1)
    assert made.sample_passages == min(SAMPLE, made.passages)
    rounding = 0.1 + made.seconds * 0.06 / made.tokens_per_second
    assert made.seconds == pytest.approx(made.tokens / made.tokens_per_second, abs=rounding)


def test_the_sample_stops_when_time_is_up(opener: Any, tmp_path: Path) -> None:
    sources = write(tmp_path / "docs", 20)
    made = plan(sources, opener("exact"), on_problem=fail, seconds=0)
    assert made.sample_passages == 2
    assert made.tokens_per_second > 0


def test_a_plan_leaves_nothing_behind(
    opener: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write(tmp_path / "docs", 2)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    made = plan(sources, opener("exact"), on_problem=fail)
    assert made.passages > 0
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_plan_of_files_without_text(opener: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    problems: list[Any] = []
    sources = find([str(tmp_path / "empty.txt")], problems.append)
    made = plan(sources, opener("exact"), on_problem=problems.append)
    assert (made.passages, made.snapshot_bytes, made.seconds) == (0, 0, 0.0)
