"""What vLLM may serve: the very model of the collection, in a setup that was tried."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_kvlink.export import ABOUT, export
from vllm_kvlink.served import Served, check_model, check_setup

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import ConfigError


@pytest.fixture
def served(rag: KVLinkRAG, tmp_path: Path) -> Served:
    path = export(rag.model, tmp_path / "served")
    hf = copy.deepcopy(rag.model.backbone.config)
    vllm = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(path), hf_config=hf, dtype=rag.model.backbone.dtype, quantization=None
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail"),
        speculative_config=None,
        lora_config=None,
    )
    return Served.of(vllm, 1)


def test_the_very_model(served: Served, rag: KVLinkRAG) -> None:
    check_setup(served)
    check_model(served, rag.model)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"failure_policy": "recompute"}, 'expected "fail"'),
        ({"cache_dtype": "fp8"}, "leave --kv-cache-dtype out"),
        ({"quantization": "awq"}, "weights of awq"),
        ({"groups": 2}, "2 groups of layers"),
        ({"lora": True}, "LoRA"),
    ],
    ids=str,
)
def test_what_must_not_be(served: Served, other: Any, told: str) -> None:
    for untried in (False, True):
        with pytest.raises(ConfigError, match=told):
            check_setup(replace(served, **other), untried=untried)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"model_type": "phi3"}, "'phi3'"),
        ({"device": "cuda"}, "'cuda'"),
        ({"ranks": 2}, "2 ranks"),
        ({"speculative": True}, "speculative"),
    ],
    ids=str,
)
def test_what_was_not_tried(served: Served, other: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=f"{told}.*untried"):
        check_setup(replace(served, **other))
    check_setup(replace(served, **other), untried=True)


def test_ranks_are_counted(served: Served) -> None:
    parallel = SimpleNamespace(
        tensor_parallel_size=2, pipeline_parallel_size=3, data_parallel_size=4
    )
    vllm = SimpleNamespace(
        model_config=SimpleNamespace(
            model="m", hf_config=served.config, dtype="torch.float32", quantization=None
        ),
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail"),
        speculative_config=object(),
        lora_config=object(),
    )
    found = Served.of(vllm, 1)
    assert (found.ranks, found.dtype) == (24, "float32")
    assert found.speculative
    assert found.lora


def test_another_model_is_refused(served: Served, rag: KVLinkRAG) -> None:
    for name, value in (("num_hidden_layers", 5), ("hidden_size", 3), ("rms_norm_eps", 0.1)):
        config = copy.deepcopy(served.config)
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=f"{name}={value}, expected .* vllm_kvlink export"):
            check_model(replace(served, config=config), rag.model)
    config = copy.deepcopy(served.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5.0}
    with pytest.raises(ConfigError, match="RoPE"):
        check_model(replace(served, config=config), rag.model)
    with pytest.raises(ConfigError, match="give vLLM --dtype float32"):
        check_model(replace(served, dtype="bfloat16"), rag.model)
    (Path(served.model) / ABOUT).write_text('{"fingerprint": "of another", "vocabulary": 258}')
    with pytest.raises(ConfigError, match="was not written from"):
        check_model(served, rag.model)
