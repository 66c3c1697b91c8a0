"""What was not tried is refused by name, with what to do."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_kvlink import Options
from vllm_kvlink.refusals import check_backend, check_engine, check_groups

from kvlink_rag.errors import ConfigError


def space(**facts: Any) -> SimpleNamespace:
    return SimpleNamespace(**facts)


ENGINE = space(
    kv_transfer_config=space(
        kv_load_failure_policy="fail", kv_role="kv_consumer", kv_connector="KVLinkConnector"
    ),
    cache_config=space(cache_dtype="auto"),
    model_config=space(
        dtype=torch.bfloat16,
        use_mla=False,
        quantization=None,
        runner_type="generate",
        hf_config=space(model_type="llama"),
    ),
    load_config=space(load_format="auto"),
    parallel_config=space(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
    speculative_config=None,
    lora_config=None,
)

REFUSED = {
    "kv_transfer_config.kv_load_failure_policy": ("recompute", "recompute passages causally"),
    "kv_transfer_config.kv_role": ("kv_both", "expected 'kv_consumer'"),
    "kv_transfer_config.kv_connector": ("MultiConnector", "expected KVLinkConnector alone"),
    "cache_config.cache_dtype": ("fp8", "expected 'auto'"),
    "model_config.use_mla": (True, "latent attention"),
    "model_config.quantization": ("awq", "expected none"),
    "model_config.runner_type": ("pooling", "expected 'generate'"),
    "model_config.hf_config.model_type": ("gemma3", '"untried": ["gemma3"]'),
    "load_config.load_format": ("dummy", "expected one of auto"),
    "parallel_config.tensor_parallel_size": (2, "start an engine for each device"),
    "parallel_config.pipeline_parallel_size": (2, "start an engine for each device"),
    "parallel_config.data_parallel_size": (2, "start an engine for each device"),
    "parallel_config.decode_context_parallel_size": (2, "start an engine for each device"),
    "speculative_config": (space(), "speculative decoding"),
    "lora_config": (space(), "vllm-kvlink export"),
}


def test_what_was_tried_is_taken() -> None:
    check_engine(ENGINE)
    own = copy.deepcopy(ENGINE)
    own.cache_config.cache_dtype = "bfloat16"
    check_engine(own)


@pytest.mark.parametrize("path", REFUSED)
def test_everything_else_is_refused(path: str) -> None:
    engine = copy.deepcopy(ENGINE)
    *way, name = path.split(".")
    inner = engine
    for step in way:
        inner = getattr(inner, step)
    value, told = REFUSED[path]
    setattr(inner, name, value)
    with pytest.raises(ConfigError) as caught:
        check_engine(engine)
    assert told in str(caught.value)
    assert "found" in str(caught.value)


def test_an_untried_type_or_back_end_is_taken_by_name_alone() -> None:
    engine = copy.deepcopy(ENGINE)
    engine.model_config.hf_config.model_type = "olmo2"
    check_engine(engine, ("olmo2",))
    check_backend("CPU_ATTN")
    check_backend("FLASH_ATTN", ("FLASH_ATTN",))
    with pytest.raises(ConfigError, match="found the attention back end FLASH_ATTN"):
        check_backend("FLASH_ATTN", ("olmo2",))


def test_one_group_of_full_attention() -> None:
    full, other = (type(name, (), {})() for name in ("FullAttentionSpec", "SlidingWindowSpec"))
    check_groups([space(kv_cache_spec=full)])
    for groups in ([], [space(kv_cache_spec=other)], [space(kv_cache_spec=full)] * 2):
        with pytest.raises(ConfigError, match="expected one of FullAttentionSpec"):
            check_groups(groups)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "found no collection"),
        ({"collection": 3}, "found no collection"),
        ({"collection": "c", "colection": "d"}, "found colection"),
        ({"collection": "c", "untried": "llama"}, "expected a list of names"),
    ],
)
def test_options_that_say_nothing_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Options.of(config)
