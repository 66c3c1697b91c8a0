"""Adapting a model whose weights stay: what is learned, that it helps, that it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WordEmbedder, byte_tokenizer, random_model

from kvlink_rag import Document, KVLinkModel, KVLinkRAG
from kvlink_rag.cli.main import main
from kvlink_rag.errors import ConfigError

pytest.importorskip("peft", reason="peft learns the new tokens")
pytest.importorskip("accelerate", reason="the Trainer runs on accelerate")

from kvlink_rag.training.adapt import HELD, ROWS, Adaptation, adapt

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
)
TEMPLATE = (
    "<bos>{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WANTED = Adaptation(questions=12, held=4, passages=4, tokens=6, steps=40, learning_rate=2e-2)
QUESTIONS = [f"What is said of town {i}?" for i in range(14)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer(0)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root)
    shape = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    random_model("llama", torch.float32, **shape).save_pretrained(root)
    return root


@pytest.fixture
def rag(base: Path, tmp_path: Path) -> Iterator[KVLinkRAG]:
    opened = KVLinkRAG.open(
        tmp_path / "passages", model=base, embedder=WordEmbedder(), device="cpu", budget=0
    )
    with opened as rag:
        rag.add([Document(f"town {i} lies at river {i % 3}", title=f"T{i}") for i in range(9)])
        yield rag


def test_reuse_comes_nearer_to_full_attention_and_the_weights_stay(
    rag: KVLinkRAG, base: Path, tmp_path: Path
) -> None:
    barely = replace(WANTED, steps=1)
    begun = adapt(rag, tmp_path / "begun", barely, questions=QUESTIONS, device="cpu")
    found = adapt(rag, tmp_path / "out", WANTED, questions=QUESTIONS, device="cpu")
    assert (found.questions, found.held) == (10, 4)
    assert found.before == replace(begun.before, first_token_ms=found.before.first_token_ms)
    assert 0 < found.after.divergence < 0.8 * begun.after.divergence
    untouched, adapted = (
        KVLinkModel.from_pretrained(p, device="cpu") for p in (base, found.directory)
    )
    weights = adapted.backbone.model.state_dict()
    for name, tensor in untouched.backbone.model.state_dict().items():
        assert torch.equal(weights[name][: len(tensor)], tensor), name
    size = (found.directory / "adapter_model.safetensors").stat().st_size
    assert size < 4 * (8 + 4) * 64 + 1000  # two rows of float32, and names


def test_an_adapted_model_reuses_exactly_with_any_number_of_passages(
    rag: KVLinkRAG, tmp_path: Path
) -> None:
    few = replace(WANTED, steps=2)
    found = adapt(rag, tmp_path / "out", few, questions=QUESTIONS, device="cpu")
    model = KVLinkModel.from_pretrained(found.directory, device="cpu")
    assert model.spec.links_shared
    assert len(model.spec.header) == few.header
    assert model.spec.max_passages is None
    documents = [Document(f"This is number {i}.") for i in range(30)]
    parts = model.prompt(documents, "Which?")
    assert model.verify(parts).holds
    said = {
        mode: model.generate(parts, mode=mode, max_new_tokens=8) for mode in ("reuse", "masked")
    }
    assert said["reuse"] == said["masked"]
    assert set(model.spec.special_ids()) | set(model.spec.header) <= set(model.never_ids)


@pytest.mark.parametrize(("header", "links"), [(3, 0), (0, 2)], ids=["header", "links"])
def test_one_kind_of_token_alone(rag: KVLinkRAG, tmp_path: Path, header: int, links: int) -> None:
    few = replace(WANTED, steps=3, header=header, links=links)
    found = adapt(rag, tmp_path / "out", few, questions=QUESTIONS, device="cpu")
    model = KVLinkModel.from_pretrained(found.directory, device="cpu")
    assert (len(model.spec.header), model.spec.links_per_passage) == (header or 1, links)
    if not header:  # that of a model nobody tuned: what its prompts begin with
        assert model.spec.header == rag.model.spec.header
    assert model.verify(model.prompt([Document("One."), Document("Two.")], "Which?")).holds
    assert found.after.divergence != found.before.divergence


def test_the_model_writes_questions_itself(rag: KVLinkRAG, tmp_path: Path) -> None:
    few = replace(WANTED, questions=5, held=2, steps=1)
    adapt(rag, tmp_path / "out", few, device="cpu")
    held, learned = (rows_in(tmp_path / "out" / name) for name in (HELD, ROWS))
    assert len(held) >= 2
    assert len(learned) >= 5
    assert not {row["set"] for row in held} & {row["set"] for row in learned}
    assert all(row["question"] and 2 <= len(row["ctxs"]) <= 4 for row in (*held, *learned))


class Stop(Exception):
    """What an interruption raises here."""


@pytest.mark.parametrize(
    ("questions", "goes_well"), [(QUESTIONS, 4), ([], 2)], ids=["given", "written"]
)
def test_an_interrupted_call_goes_on(
    rag: KVLinkRAG, tmp_path: Path, questions: list[str], goes_well: int
) -> None:
    few = replace(WANTED, questions=10, held=2, steps=1)
    calls = iter(range(goes_well))

    def stop(count: int) -> None:
        if next(calls, None) is None:
            raise Stop

    adapt(rag, tmp_path / "whole", few, questions=questions, device="cpu")
    with pytest.raises(Stop):
        adapt(rag, tmp_path / "out", few, questions=questions, device="cpu", advance=stop)
    half = (tmp_path / "out" / ROWS).read_bytes()
    assert 0 < len(half) < len((tmp_path / "whole" / ROWS).read_bytes())
    (tmp_path / "out" / ROWS).write_bytes(
        half + b'{"set": 9, "que'
    )  # as a killed process leaves it
    adapt(rag, tmp_path / "out", few, questions=questions, device="cpu")
    for name in (HELD, ROWS):
        assert rows_in(tmp_path / "out" / name) == rows_in(tmp_path / "whole" / name)


def test_what_cannot_be_adapted_is_said(rag: KVLinkRAG, tmp_path: Path) -> None:
    out, few = tmp_path / "out", replace(WANTED, steps=1)
    with pytest.raises(ConfigError, match="all of which are held out"):
        adapt(rag, out, few, questions=QUESTIONS[:3], device="cpu")
    with pytest.raises(ConfigError, match="another given, steps"):
        adapt(rag, out, replace(few, steps=2), questions=QUESTIONS, device="cpu")
    found = adapt(rag, tmp_path / "new", few, questions=QUESTIONS, device="cpu")
    with (
        KVLinkRAG.open(
            tmp_path / "two", model=found.directory, embedder=WordEmbedder(), device="cpu"
        ) as tuned,
        pytest.raises(ConfigError, match="has a spec of its own"),
    ):
        adapt(tuned, tmp_path / "again", few, device="cpu")
    rag.delete([document.id for document in rag.documents()])
    with pytest.raises(ConfigError, match="found 0 passages"):
        adapt(rag, tmp_path / "none", few, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"passages": 1}, "passages"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"header": 0, "links": 0}, "at least one"),
        ({"header": -1}, "at least one"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Adaptation(**change)


def test_the_command_refuses_a_collection(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "docs", "--out", "here", "--dir", "there"]) == 1
    assert "leave --dir out" in capsys.readouterr().err


def rows_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
