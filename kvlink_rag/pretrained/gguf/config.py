"""Architecture: the fields of a GGUF file as a configuration, and which tensor is which weight.

Strict: a field or a tensor of the model that is not known here is refused, since it would change
what the model computes. Sources: llama.cpp's `convert_hf_to_gguf.py` and `llama-model.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlink_rag.errors import ConfigError, ModelNotSupported

from .metadata import GGUFFile, dequantised

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3 divides its frequencies by
_LOW, _HIGH = 1.0, 4.0  # turns over the old window: divided whole below, not at all above

_FIELDS = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.value_length", "attention.layer_norm_rms_epsilon"),
        *("attention.sliding_window", "rope.dimension_count", "rope.freq_base", "vocab_size"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.finetuned", "rope.scale_linear"),
    }
)
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_LAYER = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BIASED = ("attn_q", "attn_k", "attn_v")  # in Qwen2


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. model_type: transformers' name; biases, norms: which weights it has more.

    interleaved: llama.cpp stores the rows of its q and k with the two halves of each head
    interleaved, for RoPE over neighbouring pairs. slides: whether there may be a sliding window.
    settings: of the configuration, besides those that the file says.
    """

    model_type: str
    architecture: str
    biases: bool = False
    norms: bool = False
    interleaved: bool = False
    slides: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


_UNBIASED = {"attention_bias": False}
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", interleaved=True, settings=_UNBIASED),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", biases=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", norms=True, settings=_UNBIASED),
}
_MISTRAL = Family("mistral", "MistralForCausalLM", interleaved=True, slides=True)


def family_of(file: GGUFFile) -> Family:
    """The architecture of `file`. Mistral is a llama with a sliding window. `ModelNotSupported`."""
    name = file.get("general.architecture", str)
    if name == "mistral" or (name == "llama" and f"{name}.attention.sliding_window" in file.fields):
        return _MISTRAL
    if name not in FAMILIES:
        raise ModelNotSupported(
            f"{file.path} is of architecture {name!r}, expected llama, mistral, qwen2 or qwen3"
        )
    return FAMILIES[name]


def weight_names(file: GGUFFile, family: Family) -> dict[str, str]:
    """transformers' name of each weight → the tensor that holds it. Raises `ModelNotSupported`."""
    names = {"model.embed_tokens.weight": "token_embd.weight"}
    for layer in range(_layers(file)):
        for theirs, ours in _layer_names(family).items():
            names[f"model.layers.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    names["model.norm.weight"] = "output_norm.weight"
    if "output.weight" in file.tensors:
        names["lm_head.weight"] = "output.weight"
    _check_tensors(file, {*names.values(), ROPE_FACTORS})
    return names


def configuration(file: GGUFFile, family: Family) -> dict[str, Any]:
    """The content of `config.json`, dtype and token ids apart."""
    name = file.get("general.architecture", str)
    _check_fields(file, name)
    heads, width = (
        file.get(f"{name}.{k}", int) for k in ("attention.head_count", "embedding_length")
    )
    if not heads or width < heads:
        raise ConfigError(f"{file.path}: {heads} heads over {width} numbers make no model")
    head_dim = _head_dim(file, name, width // heads)
    found = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": file.get(f"{name}.feed_forward_length", int),
        "num_hidden_layers": _layers(file),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{name}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.get(f"{name}.context_length", int),
        "rms_norm_eps": _shortest(file.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": _rope(file, name, head_dim),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    return found | _window(file, name, family)


def _layers(file: GGUFFile) -> int:
    count = file.get(f"{file.get('general.architecture', str)}.block_count", int)
    if not 0 < count <= len(file.tensors):
        raise ConfigError(
            f"{file.path} has {len(file.tensors)} tensors for {count} layers; fetch it again"
        )
    return count


def _layer_names(family: Family) -> dict[str, str]:
    names = _LAYER | (_QWEN3_LAYER if family.norms else {})
    weights = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in names.items()}
    biased = _BIASED if family.biases else ()
    return weights | {f"{theirs}.bias": f"{_LAYER[theirs]}.bias" for theirs in biased}


def _check_tensors(file: GGUFFile, known: set[str]) -> None:
    missing = sorted(known - set(file.tensors) - {ROPE_FACTORS})
    if missing:
        raise ModelNotSupported(
            f"{file.path} has no tensor {missing[0]} ({len(missing)} are missing); where the model "
            "is split over several files, join them with llama.cpp's llama-gguf-split --merge"
        )
    unknown = sorted(set(file.tensors) - known)
    if unknown:
        raise ModelNotSupported(
            f"{file.path} has a tensor {unknown[0]} that a plain model of its architecture has "
            f"not ({len(unknown)} such); only dense models are known"
        )


def _check_fields(file: GGUFFile, name: str) -> None:
    """Refuse fields that say something of the model which is not known here."""
    harmless = {f"{name}.{field}" for field in _FIELDS}
    for key in sorted(file.fields.keys() - harmless):
        if key.startswith(f"{name}.") and not _is_off(file, key):
            raise ModelNotSupported(f"{file.path} sets {key}, which is not known here")


def _is_off(file: GGUFFile, key: str) -> bool:
    """Whether a field says that something is not there (`expert_count` 0)."""
    try:
        return file.get(key, int) == 0
    except ConfigError:
        return False


def _head_dim(file: GGUFFile, name: str, default: int) -> int:
    """Numbers a head, the same for keys and values, all of them rotated."""
    key = file.get(f"{name}.attention.key_length", int, default)
    value = file.get(f"{name}.attention.value_length", int, key)
    rotated = file.get(f"{name}.rope.dimension_count", int, key)
    if not key == value == rotated:
        raise ModelNotSupported(
            f"{file.path} has keys of {key}, values of {value} and rotates {rotated}, expected one "
            "number for all"
        )
    return key


def _window(file: GGUFFile, name: str, family: Family) -> dict[str, Any]:
    window = file.get(f"{name}.attention.sliding_window", int, 0)
    if family.slides:
        return {**family.settings, "sliding_window": window or None}
    if window:
        raise ModelNotSupported(
            f"{file.path} is a {name} with a sliding window, which is not known"
        )
    return dict(family.settings)


def _rope(file: GGUFFile, name: str, head_dim: int) -> dict[str, Any]:
    theta = _shortest(file.get(f"{name}.rope.freq_base", float, 10000.0))
    if ROPE_FACTORS in file.tensors:
        return {"rope_theta": theta, **_llama3(file, name, theta, head_dim)}
    kind = file.get(f"{name}.rope.scaling.type", str, "none")
    factor = file.get(f"{name}.rope.scaling.factor", float, 0.0)
    if kind == "none" and factor in (0.0, 1.0) and f"{name}.rope.scale_linear" not in file.fields:
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear" and factor > 0:
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 0:
        length = file.get(f"{name}.rope.scaling.original_context_length", int)
        rule = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        return {"rope_theta": theta, **rule}
    raise ModelNotSupported(
        f"{file.path} scales RoPE by {kind!r} (factor {factor:g}), expected none, linear or yarn"
    )


def _llama3(file: GGUFFile, name: str, theta: float, head_dim: int) -> dict[str, Any]:
    """The rule of Llama 3.1 and later, which the file gives as the factors that came of it."""
    factors = dequantised(file.tensors[ROPE_FACTORS], slice(None)).reshape(-1)
    most = float(factors.max())
    length = file.get(f"{name}.rope.scaling.original_context_length", int, 8192)
    expected = _llama3_factors(theta, head_dim, most, length)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ModelNotSupported(
            f"{file.path}: the tensor {ROPE_FACTORS} is not Llama 3's rule over {length} tokens"
        )
    return {
        "rope_type": "llama3",
        "factor": most,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": length,
    }


def _llama3_factors(
    theta: float, head_dim: int, factor: float, length: int
) -> npt.NDArray[np.float64]:
    """What each frequency is divided by: float64 [head_dim / 2]."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = length * frequencies / (2 * math.pi)
    smooth = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    factors: npt.NDArray[np.float64] = 1 / (smooth * (1 - 1 / factor) + 1 / factor)
    return factors


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05, where the file's float32 is 9.99…e-06."""
    return float(str(np.float32(value)))
