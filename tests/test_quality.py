"""What reuse costs, measured: ways that are full attention cost nothing, others what they do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, WordEmbedder, byte_tokenizer, random_model
from test_oracle import documents

from kvlink_rag import KVLinkModel, KVLinkRAG
from kvlink_rag.cli.main import main
from kvlink_rag.errors import ConfigError
from kvlink_rag.evaluation.quality import FULL, measure, read_questions

QUESTIONS = ("what?", "who was it?", "and when?")


def test_ways_are_laid_beside_full_attention(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path
) -> None:
    model = make_model("llama", torch.float32, links=0)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(documents(6, seed=20))
        found = measure(rag, QUESTIONS, k=3, ways=("none", "first:9999", "select:100%"), tokens=4)
    full, none, *whole = found.ways
    assert (found.questions, full.name, none.name) == (3, FULL, "none")
    assert (full.divergence, full.agreement, full.first) == (0, 1, 1)
    for way in whole:
        assert way.divergence < 1e-6
        assert way.agreement == way.first == 1
    assert none.divergence > 0.01
    assert found.recommended in ("first:9999", "select:100%")
    assert all(way.first_token_ms > 0 for way in found.ways)


def test_without_a_way_that_is_close_full_attention_is_recommended(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path
) -> None:
    model = make_model("llama", torch.float32)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(documents(6, seed=21))
        found = measure(rag, QUESTIONS, k=4, ways=("none",), tokens=4)
    assert found.ways[1].agreement < 0.95
    assert found.recommended == FULL
    assert "none is nearest" in found.reason


def test_what_cannot_be_measured_is_told(
    make_model: ModelMaker, embedder: WordEmbedder, tmp_path: Path
) -> None:
    with KVLinkRAG.open(tmp_path, model=make_model(), embedder=embedder) as rag:
        with pytest.raises(ConfigError, match="no questions"):
            measure(rag, [])
        with pytest.raises(ConfigError, match="no documents"):
            measure(rag, QUESTIONS)
        with pytest.raises(ConfigError, match="repair is 'all'"):
            measure(rag, QUESTIONS, ways=("all",))


def test_questions_are_lines_or_json_lines() -> None:
    lines = ["", " Who? ", '{"question": "When?", "answers": []}', "   "]
    assert list(read_questions(lines)) == ["Who?", "When?"]
    with pytest.raises(ConfigError, match="line 1 is no JSON object with a question"):
        list(read_questions(['{"asked": "When?"}']))


def test_the_command_shows_it(
    make_model: ModelMaker,
    embedder: WordEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, opened = make_model(), KVLinkRAG.open.__func__  # type: ignore[attr-defined]

    def open_here(directory: Path, **arguments: object) -> KVLinkRAG:
        arguments |= {"model": model, "embedder": embedder}
        rag: KVLinkRAG = opened(KVLinkRAG, directory, **arguments)
        return rag

    monkeypatch.setattr(KVLinkRAG, "open", open_here)
    with open_here(tmp_path / "c") as rag:
        rag.add(documents(4, seed=22))
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    command = ["--dir", str(tmp_path / "c"), "verify", "-k", "2"]
    assert main([*command, "--quality", str(tmp_path / "questions.txt")]) == 0
    said = capsys.readouterr().out
    assert "3 questions over 2 passages" in said
    assert "recommended: " in said
    assert main([*command, "--quality", str(tmp_path / "questions.txt"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in fields["ways"]] == ["full", "none", "first:16", "select:15%"]
    assert main([*command, "--quality", str(tmp_path / "nothing.txt")]) == 1


def test_a_model_that_nobody_tuned_says_so_once(
    embedder: WordEmbedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = KVLinkModel(random_model("llama", torch.float32), byte_tokenizer(), name="plain")
    caplog.set_level(logging.WARNING)

    def told() -> int:
        return sum("was not tuned" in record.getMessage() for record in caplog.records)

    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(documents(3, seed=23))
        rag.ask("what?", k=2, max_new_tokens=1, repair="first:16")
        rag.ask("what?", k=2, max_new_tokens=1, mode="full")
        assert told() == 0
        for _ in range(2):
            rag.ask("what?", k=2, max_new_tokens=1)
        assert told() == 1
    assert "repair='first:16'" in caplog.text
    caplog.clear()
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder, repair="first:4") as rag:
        rag.ask("what?", k=2, max_new_tokens=1, repair=None)  # as the command line asks
        assert told() == 0
