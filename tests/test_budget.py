"""Snapshots that nobody has asked for take no more than their budget, and nothing is lost by it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.arguments import Budget, parse_budget
from kvlink_rag.disk import atomic_files
from kvlink_rag.errors import ConfigError
from kvlink_rag.ingest.estimate import bytes_at_most, new_bytes
from kvlink_rag.ingest.readers import find

DOCUMENTS = [Document(f"The harbour of town {i} has {i} cranes.", id=f"{i}") for i in range(12)]
Opened = Callable[..., KVLinkRAG]


@pytest.fixture
def opened(make_model: ModelMaker, tmp_path: Path) -> Opened:
    def open_(**settings: Any) -> KVLinkRAG:
        model = make_model("llama", torch.float32)
        return KVLinkRAG.open(tmp_path / "c", model=model, embedder=WordEmbedder(), **settings)

    return open_


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", Budget()),
        ("50%", Budget("50%", share=0.5)),
        ("12.5%", Budget("12.5%", share=0.125)),
        ("20GB", Budget("20GB", bytes=20 * 10**9)),
        (1000, Budget("1000", bytes=1000)),
    ],
)
def test_budgets(name: str | int, expected: Budget) -> None:
    assert parse_budget(name) == expected


@pytest.mark.parametrize("name", ["", "150%", "-1", "half", "5 %", None, True])
def test_what_is_no_budget_is_told(name: Any) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(name)


def test_what_is_over_the_budget_is_encoded_when_it_is_asked_for(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(budget="none") as rag:
        rag.add(DOCUMENTS[:5])
        five = rag.stats().snapshot_bytes
        rag.delete([d.id for d in DOCUMENTS[:5]])
    with opened(budget=five + 10, codec=None) as rag, caplog.at_level(logging.WARNING):
        report = rag.add(DOCUMENTS)
        assert report.added == 12
        assert report.encoded + report.deferred == 12
        assert 4 <= report.encoded <= 5
        assert rag.stats().snapshot_bytes <= five + 10
        assert (
            f"{report.deferred} passages are encoded when they are first asked for" in caplog.text
        )
        assert rag.check() == []  # what the budget leaves out is no fault
        assert rag.search("harbour of town 11", 1)[0].document.id == "11"
        late = rag.ask("harbour of town 11?", k=1, max_new_tokens=2)
        assert late.trace.snapshots_encoded == 1
        assert rag.ask("harbour of town 11?", k=1, max_new_tokens=2).trace.snapshots_found == 1
        parts = rag.model.prompt([late.hits[0].document], "harbour of town 11?")
        masked = rag.model.generate(parts, mode="masked", max_new_tokens=2)
        assert late.text == masked
        assert rag.check() == []
    with opened() as rag:  # the budget is remembered
        assert rag.stats().budget == f"{five + 10}"
        assert rag.check(fix=True) == []
        assert rag.stats().snapshots == report.encoded + 1
    with opened(budget="none") as rag:
        assert len(rag.check()) == 12 - report.encoded - 1
        assert rag.add(DOCUMENTS).encoded == 12 - report.encoded - 1
        assert rag.check() == []


def test_a_share_is_of_the_disk_without_the_snapshots(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = [0]

    def free(directory: Path) -> int:
        used = sum(f.stat().st_size for f in directory.rglob("*.safetensors"))
        return disk[0] - used

    monkeypatch.setattr(atomic_files, "free_bytes", free)
    with opened(budget="50%") as rag:
        disk[0] = 10**9
        rag.add(DOCUMENTS[:1])
        one = rag.stats().snapshot_bytes
        disk[0] = 8 * one + 1000  # room for four, and not for the half of what is left each time
        for document in DOCUMENTS[1:]:
            rag.add([document])
        assert 3 <= rag.stats().snapshots <= 4


def test_what_files_will_take_is_known_before(opened: Opened, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"The harbour of town {i} has {i} cranes. " * 9)
    (tmp_path / "6.txt").write_text((tmp_path / "5.txt").read_text())
    files = find([tmp_path], print)
    with opened() as rag:
        planned = new_bytes(rag, files)
        assert 0 < planned <= bytes_at_most(rag, files)
        from kvlink_rag.ingest.index_files import ingest

        ingest(rag, files, on_problem=print)
        assert rag.stats().snapshot_bytes == planned
        assert new_bytes(rag, files) == 0
