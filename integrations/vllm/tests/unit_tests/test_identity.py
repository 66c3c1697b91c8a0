"""The directory that is exported is the model that prefills, and any other is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_kvlink import export
from vllm_kvlink.export import main, served_vocabulary
from vllm_kvlink.identity import check_same

from kvlink_rag import KVLinkModel
from kvlink_rag.errors import ConfigError, SettingsMismatch


@pytest.fixture
def served(tmp_path: Path, model: KVLinkModel) -> Path:
    export(model, tmp_path / "served")
    return tmp_path / "served"


def check(model: KVLinkModel, served: Path, dtype: torch.dtype = torch.float32) -> None:
    check_same(model, served, AutoConfig.from_pretrained(served), dtype)


def test_an_export_is_the_model_without_added_rows(model: KVLinkModel, served: Path) -> None:
    check(model, served)
    loaded = AutoModelForCausalLM.from_pretrained(served)
    assert loaded.config.vocab_size == served_vocabulary(model) == tiny.VOCABULARY
    ids = torch.tensor([[256, 65, 66, 67]])
    whole = model.backbone.model(input_ids=ids).logits[..., : tiny.VOCABULARY]
    torch.testing.assert_close(loaded(input_ids=ids).logits, whole, atol=1e-5, rtol=0)


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    module = tiny.module()
    module.config.tie_word_embeddings = True
    module.lm_head.weight = module.model.embed_tokens.weight
    tied = KVLinkModel(module, tiny.tokenizer(), tiny.spec())
    export(tied, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    check(tied, tmp_path / "tied")


def change(served: Path, name: str) -> None:
    """One number of one tensor."""
    tensors = load_file(served / "model.safetensors")
    tensors[name].view(-1)[7] += 1e-3
    save_file(tensors, served / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_one_other_number_is_refused(model: KVLinkModel, served: Path, name: str) -> None:
    change(served, name)
    with pytest.raises(SettingsMismatch, match=f"{name} in .* has other numbers"):
        check(model, served)


def test_a_tensor_that_lacks_or_is_too_much_is_refused(model: KVLinkModel, served: Path) -> None:
    tensors = load_file(served / "model.safetensors")
    one = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, served / "model.safetensors")
    with pytest.raises(SettingsMismatch, match=r"lack model.layers.0.mlp.up_proj.weight"):
        check(model, served)
    save_file({"model.layers.9.mlp.up_proj.weight": one}, served / "more.safetensors")
    with pytest.raises(SettingsMismatch, match="also holds"):
        check(model, served)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 9e5}),
        ("num_key_value_heads", 4),
        ("rms_norm_eps", 1e-3),
    ],
)
def test_another_configuration_is_refused(
    model: KVLinkModel, served: Path, name: str, value: Any
) -> None:
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(SettingsMismatch, match=name):
        check(model, served)


def test_another_dtype_is_refused(model: KVLinkModel, served: Path) -> None:
    with pytest.raises(SettingsMismatch, match="--dtype float32"):
        check(model, served, torch.bfloat16)


def test_a_directory_with_something_in_it_is_left_alone(model: KVLinkModel, served: Path) -> None:
    before = sorted(served.iterdir())
    with pytest.raises(ConfigError, match="expected an empty directory"):
        export(model, served)
    assert sorted(served.iterdir()) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.saved(tmp_path / "model")
    assert main(["export", str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert f"{tiny.VOCABULARY} of " in capsys.readouterr().out
    assert main(["export", str(source), str(tmp_path / "out")]) == 1
    assert "expected an empty directory" in capsys.readouterr().err
