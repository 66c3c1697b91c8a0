"""GGUF files as llama.cpp's converter would write them, made with `gguf`'s own writer and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
KINDS: dict[str, tuple[Any, Any, str]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, "llama"),
    "mistral": (MistralConfig, MistralForCausalLM, "llama"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen3"),
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
QUANTISED_BY_HAND = ("Q4_K", "Q5_K", "Q6_K")  # the package reads these, but does not write them


def small_model(kind: str, vocabulary: int, **changes: Any) -> PreTrainedModel:
    """A random model of two layers whose rows hold whole blocks of 256 numbers."""
    config_class, model_class, _ = KINDS[kind]
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
        "tie_word_embeddings": False,
    }
    torch.manual_seed(3)
    model = model_class(config_class(**{**shape, **changes})).eval()
    for name, weight in model.named_parameters():  # norms and biases are ones and zeros at first
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
        elif "embed" not in name:
            weight.data *= 3
    return model


def write_model(
    path: Path,
    kind: str,
    model: PreTrainedModel,
    tokenizer: dict[str, Any],
    quantisation: str = "F32",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write `model` and the fields of `tokenizer`. fields: more of them, None takes one away."""
    config, name = model.config, KINDS[kind][2]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    facts: dict[str, Any] = {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope_parameters["rope_theta"],
        **({f"{name}.rope.dimension_count": head_dim} if name == "llama" else {}),
        **({f"{name}.attention.key_length": head_dim} if name == "qwen3" else {}),
        **({f"{name}.attention.value_length": head_dim} if name == "qwen3" else {}),
        **tokenizer,
        **(fields or {}),
    }
    writer = gguf.GGUFWriter(path, facts.pop("general.architecture", name))
    for key, value in facts.items():
        _add(writer, key, value)
    for theirs, values, quantised in _tensors(model, name, quantisation):
        if quantised in ("F32", "F16"):
            writer.add_tensor(
                theirs, values.astype(np.float32 if quantised == "F32" else np.float16)
            )
        else:
            data = quantise(values, quantised)
            writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType[quantised])
    for theirs, values in (tensors or {}).items():
        writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantise(values: np.ndarray, quantisation: str) -> np.ndarray:
    """Bytes of `values` [rows, numbers]; random ones of sane size where nothing quantises them."""
    kind = gguf.GGMLQuantizationType[quantisation]
    if quantisation not in QUANTISED_BY_HAND:
        return gguf.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    chance = np.random.default_rng(values.size)
    blocks = chance.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    scales = chance.uniform(1e-4, 3e-4, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if quantisation == "Q6_K":
        blocks[:, -2:] = scales[:, :2]  # the scale stands at the end
    else:
        blocks[:, :4] = scales  # scale and minimum stand in front
    return blocks.reshape(len(values), -1)


def fields_of(tokenizer: Tokenizer, rule: str, **more: Any) -> dict[str, Any]:
    """The fields that llama.cpp's converter writes for a byte-level tokenizer."""
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    kinds = [
        NORMAL if i not in added else (CONTROL if added[i]["special"] else USER)
        for i in range(count)
    ]
    merges = content["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def _tensors(model: PreTrainedModel, name: str, quantisation: str) -> Any:
    """Names, values and types as llama.cpp writes them: vectors stay float32."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], model.config.num_hidden_layers)
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    for ours, weight in model.state_dict().items():
        if ours == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = weight.numpy()
        for projection, count in heads.items():
            if name == "llama" and f"{projection}.weight" in ours:
                values = _permute(values, count)
        stem, _, suffix = ours.rpartition(".")
        theirs = names.get_name(stem)
        assert theirs is not None, ours
        yield f"{theirs}.{suffix}", values, "F32" if values.ndim == 1 else quantisation


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's `convert_hf_to_gguf.py`."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
