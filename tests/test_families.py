"""The registry of model families: complete, proved by the oracle, and the only place that asks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers

import kvlink_rag
from kvlink_rag import Document, KVLinkModel
from kvlink_rag.engine.families import FAMILIES, check_supported, masks_by_layer, window_of
from kvlink_rag.errors import ModelNotSupported, PromptTooLong


def test_the_oracle_covers_every_family_and_no_other() -> None:
    """`test_oracle` runs the models of `conftest`."""
    assert {config.model_type for config, _, _ in conftest.FAMILIES.values()} == set(FAMILIES)


def test_other_families_are_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(ModelNotSupported, match="'gpt2', expected one of llama, mistral, qwen2"):
        check_supported(SimpleNamespace(model_type="gpt2"))


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_quantised_checkpoints_are_refused_by_name(
    method: str, saved_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(saved_pair[0], tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    fields = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(fields))
    with pytest.raises(ModelNotSupported, match=f"quantised by {method}, expected plain weights"):
        KVLinkModel.from_pretrained(tmp_path / "m")


def test_multimodal_checkpoints_are_refused_with_the_remedy() -> None:
    config = transformers.Mistral3Config()
    with pytest.raises(ModelNotSupported, match=r"multimodal.*'mistral3'.*\(type 'mistral'\)"):
        check_supported(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0.*no caps"),
        ({"use_bidirectional_attention": True}, "encoded causally"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "RoPE type 'dynamic'",
        ),
    ],
)
def test_what_of_gemma_3_cannot_be_reused_is_refused(
    change: dict[str, object], message: str
) -> None:
    config = transformers.Gemma3TextConfig()
    check_supported(config)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ModelNotSupported, match=message):
        check_supported(config)


def test_nothing_else_tests_a_model_type() -> None:
    test = re.compile(r"model_type\s*(?:==|!=|in\b|not\b)")
    root = Path(kvlink_rag.__file__).parent
    found = {f.name for f in root.rglob("*.py") if test.search(f.read_text(encoding="utf-8"))}
    assert found == set()


def asked_windows(name: str) -> tuple[int | None, list[int | None]]:
    """The window, and the windows for which a model of `conftest` wants masks."""
    make, _, extra = conftest.FAMILIES[name]
    config = make(**{**conftest.SHAPE, **extra})
    asked: list[int | None] = []
    masks_by_layer(config, asked.append)
    return window_of(config), asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (None, [None])),
        ("mistral", (None, [None])),
        ("mistral-window", (24, [24])),
        ("qwen2", (None, [None])),
        ("qwen2-window", (24, [None, 24])),
        ("qwen3", (None, [None])),
        ("qwen3_moe", (None, [None])),
        ("mixtral", (None, [None])),
        ("ministral", (24, [None, 24])),
        ("starcoder2", (24, [24])),
        ("olmo2", (None, [None])),
        ("cwm", (24, [None, 24])),
    ],
)
def test_masks_and_windows(name: str, expected: object) -> None:
    assert asked_windows(name) == expected


def test_queries_scaled_by_position_bound_the_window() -> None:
    """Ministral 3 scales them beyond the original window: no passage may stand there."""
    rope = {**conftest.MINISTRAL3_ROPE, "original_max_position_embeddings": 64}
    model = conftest.random_model("ministral3", torch.float32, rope_parameters=rope)
    made = KVLinkModel(model, conftest.byte_tokenizer(), conftest.byte_spec())
    assert made.window == 64
    documents = [Document("a harbour of grey stone"), Document("a crane of the year 1911")]
    with pytest.raises(PromptTooLong):
        made.prefill(made.prompt(documents, "where is it now?"))
    short = made.prompt([Document("a harbour"), Document("a crane")], "where?")
    assert made.verify(short).holds
