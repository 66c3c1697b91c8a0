"""What vLLM serves against what the collection's model is: refused where they differ.

The pages are filled by one model and read by another, so both must be the same numbers: weights,
RoPE, dtype, shapes. What vLLM can do and nobody tried here is refused too, unless the connector's
configuration says `"untried": true`. Reads vLLM's configuration by names; imports none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag import KVLinkModel
from kvlink_rag.errors import ConfigError

from .export import exported_fingerprint

TRIED = ("llama", "qwen3")  # architectures that were run on vLLM, see tests/
SHAPES = (
    "num_hidden_layers",
    "num_key_value_heads",
    "num_attention_heads",
    "hidden_size",
    "rms_norm_eps",
)


@dataclass(frozen=True, slots=True)
class Served:
    """The part of vLLM's configuration that matters here.

    groups: of layers whose pages are managed apart; more than one where windows or states differ.
    """

    model: str
    model_type: str
    config: Any
    dtype: str
    cache_dtype: str
    quantization: str | None
    device: str
    ranks: int
    groups: int
    failure_policy: str
    speculative: bool
    lora: bool

    @classmethod
    def of(cls, vllm: Any, groups: int) -> Served:
        """From a `VllmConfig`."""
        model, parallel = vllm.model_config, vllm.parallel_config
        ranks = (
            parallel.tensor_parallel_size
            * parallel.pipeline_parallel_size
            * getattr(parallel, "data_parallel_size", 1)
            * getattr(parallel, "decode_context_parallel_size", 1)
        )
        return cls(
            model=str(model.model),
            model_type=str(model.hf_config.model_type),
            config=model.hf_config,
            dtype=str(model.dtype).removeprefix("torch."),
            cache_dtype=str(vllm.cache_config.cache_dtype),
            quantization=model.quantization,
            device=str(vllm.device_config.device_type),
            ranks=ranks,
            groups=groups,
            failure_policy=str(vllm.kv_transfer_config.kv_load_failure_policy),
            speculative=vllm.speculative_config is not None,
            lora=vllm.lora_config is not None,
        )


def check_setup(served: Served, *, untried: bool = False) -> None:
    """Raise `ConfigError` for what must not be, and for what was not tried unless `untried`."""
    for wrong, what in _must_not(served):
        if wrong:
            raise ConfigError(f"vLLM is set up with {what}")
    for wrong, what in _not_tried(served):
        if wrong and not untried:
            raise ConfigError(
                f'vLLM is set up with {what}, which was never run with KVLink; "untried": true in '
                "kv_connector_extra_config runs it all the same (compare answers first)"
            )


def check_model(served: Served, model: KVLinkModel) -> None:
    """Raise `ConfigError` where vLLM does not serve the very model of the collection."""
    config, backbone = model.backbone.config, model.backbone
    for name in SHAPES:
        found, expected = (getattr(each, name, None) for each in (served.config, config))
        if found != expected:
            raise ConfigError(
                f"vLLM serves a model with {name}={found}, expected {expected}, that of "
                f"{model.name}; {_REMEDY}"
            )
    if _rope(served.config) != _rope(config):
        raise ConfigError(
            f"vLLM serves a model with RoPE {_rope(served.config)}, expected {_rope(config)}; "
            f"{_REMEDY}"
        )
    if served.dtype != backbone.dtype_name:
        raise ConfigError(
            f"vLLM computes in {served.dtype}, the collection's model in {backbone.dtype_name}; "
            f"give vLLM --dtype {backbone.dtype_name}"
        )
    if exported_fingerprint(Path(served.model)) != model.fingerprint:
        raise ConfigError(
            f"{served.model} was not written from {model.name} as this collection has it; {_REMEDY}"
        )


_REMEDY = "write its directory with: python -m vllm_kvlink export COLLECTION DIRECTORY"


def _must_not(served: Served) -> Iterator[tuple[bool, str]]:
    yield (
        served.failure_policy != "fail",
        f"kv_load_failure_policy={served.failure_policy!r}: a prompt that is computed again as "
        'plain text is another prompt; expected "fail", the default',
    )
    yield (
        served.cache_dtype not in ("auto", served.dtype),
        f"pages of {served.cache_dtype} under {served.dtype}, which would round what was "
        "computed; leave --kv-cache-dtype out",
    )
    yield (
        served.quantization is not None,
        (
            f"weights of {served.quantization}, which are not those that snapshots were made of; "
            "serve the directory that `python -m vllm_kvlink export` writes"
        ),
    )
    yield (
        served.groups != 1,
        (f"{served.groups} groups of layers with own pages (windows, states), expected one"),
    )
    yield served.lora, "LoRA adapters at question time, which snapshots know nothing of"


def _not_tried(served: Served) -> Iterator[tuple[bool, str]]:
    yield served.model_type not in TRIED, f"a model of the type {served.model_type!r}"
    yield served.device != "cpu", f"the device {served.device!r}"
    yield served.ranks != 1, f"{served.ranks} ranks"
    yield served.speculative, "speculative decoding"


def _rope(config: Any) -> dict[str, Any]:
    """RoPE's parameters, however a version of transformers keeps them."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    found.setdefault("rope_theta", getattr(config, "rope_theta", None))
    return {key: value for key, value in sorted(found.items()) if value is not None}
