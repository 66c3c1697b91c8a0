"""The shipped files: they load by the ordinary loaders, fit their budget and agree with each
other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import kvlink_rag
from kvlink_rag.datasets.answers import final_answer
from kvlink_rag.prompt.spec import SPEC_FILE, Spec
from kvlink_rag.prompt.tokenizer import PartTokenizer
from kvlink_rag.training.evaluate_small import held_out, measure
from kvlink_rag.training.tokenizer import small_spec

BUNDLED = Path(kvlink_rag.__file__).parent / "bundled"
MEGABYTE = 1_000_000


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (BUNDLED / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED / "lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED / "lm")


def test_all_files_together_are_at_most_20_megabytes() -> None:
    sizes = [path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(sizes) <= 20 * MEGABYTE


def test_the_language_model_declares_its_window_and_its_spec(model: Any) -> None:
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings >= 8192
    assert Spec.load(BUNDLED / "lm" / SPEC_FILE) == small_spec()


def test_the_chat_template_writes_the_prompt_preset(tokenizer: Any) -> None:
    system = "You answer questions from the documents."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Who?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    preset = small_spec().prompt_preset
    assert text == f"{preset.before}{preset.between}Who?{preset.after}"
    assert tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize(
    "text",
    [
        "Quorvale",
        "naïve café",
        "漢字かな交じり文",
        "🙂🏳️‍🌈",
        "tabs\tand\r\nends ",
        "<|end|>",
        "\x00",
    ],
)
def test_any_text_can_be_encoded_and_comes_back(tokenizer: Any, text: str) -> None:
    parts = PartTokenizer(tokenizer)
    ids = parts.encode(text)
    assert min(ids) >= len(small_spec().special_ids())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_encoder_loads_and_tells_questions_apart(tokenizer: Any) -> None:
    encoder = AutoModel.from_pretrained(BUNDLED / "encoder").eval()
    reader = AutoTokenizer.from_pretrained(BUNDLED / "encoder")
    documents = {
        row["id"]: f"{row['title']} {row['text']}".strip() for row in rows("documents.jsonl")
    }
    questions = [row for row in rows("questions.jsonl") if row["kind"] == "one-hop"]

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:
        inputs = reader(texts, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        hidden = encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)

    scores = embed([row["question"] for row in questions]) @ embed(list(documents.values())).T
    ids = list(documents)
    found = [
        row["gold"][0] in [ids[i] for i in best]
        for row, best in zip(questions, scores.topk(10).indices.tolist(), strict=True)
    ]
    assert sum(found) >= 0.9 * len(found)


def test_the_demo_questions_rest_on_the_demo_documents() -> None:
    documents = {row["id"]: row["text"].lower() for row in rows("documents.jsonl")}
    questions = rows("questions.jsonl")
    assert 250 <= len(documents) <= 400
    assert {row["kind"] for row in questions} == {"one-hop", "two-hop", "absent"}
    for row in questions:
        assert bool(row["gold"]) == (row["kind"] != "absent")
        if row["gold"]:
            assert final_answer(row["answer"]) in documents[row["gold"][-1]]


def test_the_language_model_answers_held_out_questions(model: Any, tokenizer: Any) -> None:
    """A smoke test; the marks themselves are measured on 1,000 questions."""
    found = measure(model, PartTokenizer(tokenizer), small_spec(), held_out(30, seed=123))
    right = sum(share * count for share, count in found.values())
    assert right >= 0.9 * 30
