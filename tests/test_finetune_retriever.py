"""Contriever's fine-tuning, on a tiny random encoder: it learns, and the result opens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer

from kvlink_rag import ContrieverEmbedder
from kvlink_rag.datasets.rows import Source
from kvlink_rag.datasets.sets import Skipped
from kvlink_rag.errors import ConfigError
from kvlink_rag.training.retriever import (
    Pair,
    Recipe,
    _Collator,
    _PairTrainer,
    main,
    read_pairs,
    train,
)


def found(embedder: ContrieverEmbedder, pairs: list[Pair]) -> float:
    """The share of questions whose own passage comes first."""
    questions = embedder.embed_queries([pair.question for pair in pairs])
    passages = embedder.embed([pair.passage for pair in pairs])
    return float(((questions @ passages.T).argmax(1) == range(len(pairs))).mean())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that only training can join: what the passage says has no word of the question."""
    names = ["red", "blue", "green", "stone", "river", "moon", "glass", "iron"]
    rows = [
        {"question": f"code {i}?", "passage": f"The {name} house.", "title": name.title()}
        for i, name in enumerate(names)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_find_their_passages_afterwards(
    file: Path, saved_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = list(read_pairs(Source(str(file)), Skipped("refuse")))
    before = ContrieverEmbedder.from_pretrained(saved_pair[1], device="cpu")
    options = ["--steps", "120", "--batch", "8", "--learning-rate", "1e-2", "--out", str(tmp_path)]
    assert main(["--model", str(saved_pair[1]), "--data", str(file), *options]) == 0
    assert "8 pairs; the encoder is in" in capsys.readouterr().out
    after = ContrieverEmbedder.from_pretrained(tmp_path / "model", device="cpu")
    assert found(before, pairs) <= 0.5
    assert found(after, pairs) == 1.0
    assert after.fingerprint != before.fingerprint


def test_the_loss_is_that_of_the_right_passage_among_all() -> None:
    """By hand: equal embeddings give log n, and an equal passage elsewhere leaves the sum."""
    vectors = torch.ones(3, 1, 4)

    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return type("Output", (), {"last_hidden_state": vectors[: len(input_ids)]})

    trainer = _PairTrainer.__new__(_PairTrainer)
    tokenizer = byte_tokenizer()
    for passages, choices in ((["a", "b", "c"], (3, 3, 3)), (["a", "b", "a"], (2, 3, 2))):
        batch = _Collator(tokenizer, 8)([Pair("q", passage) for passage in passages])
        ones = {"input_ids": torch.ones(3, 1), "attention_mask": torch.ones(3, 1)}
        loss = trainer.compute_loss(Encoder(), {**batch, "questions": ones, "passages": ones})
        assert float(loss) == pytest.approx(sum(map(math.log, choices)) / 3)


def test_pairs_come_from_gold_documents(tmp_path: Path) -> None:
    ctxs = [{"title": "A", "text": "One."}, {"title": "B", "text": "Two.", "isgold": True}]
    rows = [
        {"question": "Who?", "answers": ["x"], "ctxs": ctxs},
        {"question": "Only?", "answers": ["x"], "ctxs": ctxs[:1]},
        {"question": "None?", "answers": ["x"], "ctxs": [ctxs[0], ctxs[0]]},
        {"passage": "No question."},
        {"question": "?", "passage": 5},
    ]
    path, skipped = tmp_path / "rows.json", Skipped()
    path.write_text(json.dumps(rows))
    pairs = list(read_pairs(Source(str(path)), skipped))
    assert [(p.question, "Two." in p.passage, "B" in p.passage) for p in pairs] == [
        ("Who?", True, True),
        ("Only?", False, False),
    ]
    assert skipped.reasons == {"pair": 3}
    with pytest.raises(ConfigError, match="found 1 pairs"):
        train("owner/any", pairs[:1], tmp_path, Recipe())
