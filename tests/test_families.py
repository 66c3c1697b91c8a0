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
from kvlink_rag.errors import ConfigError, ModelNotSupported, PromptTooLong


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
        ("phi3-window", (24, [24])),
        ("phi4-mini", (None, [None])),  # its window is longer than any prompt
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


def longrope(original: int, most: int = 131072) -> KVLinkModel:
    """A tiny Phi-4-mini whose original window is that long."""
    windows = {"original_max_position_embeddings": original, "max_position_embeddings": most}
    model = conftest.random_model("phi4-mini", torch.float32, **windows)
    return KVLinkModel(model, conftest.byte_tokenizer(), conftest.byte_spec())


def test_longrope_is_held_within_its_original_window() -> None:
    """Beyond, transformers turns all keys by the long factors: stored ones would be others."""
    made = longrope(64)
    rotary, hidden = made.backbone.model.model.rotary_emb, torch.zeros(1)
    first, beyond = (rotary(hidden, torch.arange(n)[None])[0][0, :64] for n in (64, 65))
    assert not torch.allclose(first, beyond, atol=0.1)
    assert made.window == 64
    documents = [Document("a harbour of grey stone"), Document("a crane of the year 1911")]
    with pytest.raises(PromptTooLong):
        made.prefill(made.prompt(documents, "where is it now?"))
    short = made.prompt([Document("a harbour"), Document("a crane")], "where?")
    assert made.verify(short).holds
    room = made.window - len(made.layout(short))
    streams = {m: made.stream(short, max_new_tokens=999, mode=m) for m in ("reuse", "masked")}
    texts = {mode: "".join(stream) for mode, stream in streams.items()}
    assert texts["reuse"] == texts["masked"]
    assert streams["reuse"].trace.generated_tokens == room  # the answer ends there too


def test_longrope_by_its_first_name_is_refused_as_transformers_does(tmp_path: Path) -> None:
    """Phi's first files said "su", for which transformers 5 misses a setting."""
    made = longrope(64)
    made.backbone.model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    rope = fields.pop("rope_parameters")
    scaling = {"type": "su", **{name: rope[name] for name in ("short_factor", "long_factor")}}
    file.write_text(json.dumps({**fields, "rope_scaling": scaling, "partial_rotary_factor": 0.75}))
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        KVLinkModel.from_pretrained(tmp_path)


def test_what_scales_longrope_is_part_of_the_identity() -> None:
    """Cosines and sines are scaled by the ratio of the whole window to the original one."""
    made, other = longrope(1024), longrope(1024, most=4096)
    scales = [each.backbone.model.model.rotary_emb.attention_scaling for each in (made, other)]
    assert scales[0] != scales[1]
    assert made.fingerprint != other.fingerprint
    assert made.fingerprint == longrope(1024).fingerprint


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope"}, "RoPE type 'longrope', expected one of default, linear"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial rotary factor"),
    ],
)
def test_rope_as_phi_has_it_is_refused_in_others(rope: dict[str, object], message: str) -> None:
    config = transformers.LlamaConfig()
    config.rope_parameters = rope
    with pytest.raises(ModelNotSupported, match=message):
        check_supported(config)


def test_a_fused_projection_that_an_adapter_changes_is_followed() -> None:
    """The hooks move to what PEFT puts in its place; keys and values are the changed ones."""
    peft = pytest.importorskip("peft", reason="pip install 'kvlink-rag[train]'")
    made = KVLinkModel(
        conftest.random_model("phi4-mini", torch.float32),
        conftest.byte_tokenizer(),
        conftest.byte_spec(),
    )
    parts = made.prompt([Document("a harbour"), Document("a crane")], "where?")
    plain = made.encoder.one([5, 6, 7])
    lora = peft.LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, made.backbone.model)
    changed = made.encoder.one([5, 6, 7])
    for name in ("keys", "values"):
        assert not torch.allclose(getattr(changed, name)[0], getattr(plain, name)[0], atol=1e-3)
    assert made.verify(parts).holds
