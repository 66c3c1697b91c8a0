"""Whether the model that decodes is the one that prefills: weights, RoPE, dtype, shape.

Knows a directory of safetensors, two configurations and a module; imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvlink_rag import KVLinkModel
from kvlink_rag.errors import SettingsMismatch

# Facts of a configuration that change no key and no value.
ELSEWHERE = frozenset(
    {
        *("vocab_size", "architectures", "dtype", "torch_dtype", "_name_or_path", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
        *("_attn_implementation", "attn_implementation"),
    }
)
REMEDY = "write the directory anew with: vllm-kvlink export, and serve that"


def check_same(model: KVLinkModel, directory: Path, config: Any, dtype: torch.dtype) -> None:
    """Raise `SettingsMismatch` where vLLM serves another model than `model`.

    directory: whose weights vLLM loads. config: the transformers configuration that it goes by.
    """
    check_dtype(model.backbone.dtype, dtype)
    check_config(config.to_dict(), model.backbone.config.to_dict())
    check_weights(directory, model.backbone.model.state_dict())


def check_dtype(prefills: torch.dtype, decodes: torch.dtype) -> None:
    """Raise `SettingsMismatch` where the two compute in different numbers."""
    if prefills != decodes:
        raise SettingsMismatch(
            f"vLLM computes in {decodes}, found a model that prefills in {prefills}; give vLLM "
            f"--dtype {str(prefills).removeprefix('torch.')}"
        )


def check_config(decodes: Mapping[str, Any], prefills: Mapping[str, Any]) -> None:
    """Raise `SettingsMismatch` for the first fact (RoPE among them) in which the two differ."""
    for name in sorted(set(prefills) - ELSEWHERE):
        if name in decodes and decodes[name] != prefills[name]:
            raise SettingsMismatch(
                f"the configuration that vLLM serves has {name}={decodes[name]!r}, expected "
                f"{prefills[name]!r} as the model that prefills; {REMEDY}, without --hf-overrides"
            )
    for name in ("rope_parameters", "num_hidden_layers", "num_key_value_heads"):
        if name in prefills and name not in decodes:
            raise SettingsMismatch(f"the configuration that vLLM serves has no {name}; {REMEDY}")


def check_weights(directory: Path, expected: Mapping[str, Tensor]) -> None:
    """Raise `SettingsMismatch` unless the directory holds these tensors, number by number.

    Embeddings there may lack the rows that were added for link tokens.
    """
    left = dict(expected)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name not in left:
                    raise SettingsMismatch(
                        f"{file} also holds {name}, which the model that prefills has not; {REMEDY}"
                    )
                _check_equal(file, name, tensors.get_tensor(name), left.pop(name))
    tied = {tensor.data_ptr() for name, tensor in expected.items() if name not in left}
    if lacking := [name for name, tensor in left.items() if tensor.data_ptr() not in tied]:
        raise SettingsMismatch(
            f"the weights in {directory} lack {lacking[0]}, expected all of the model that "
            f"prefills; {REMEDY}"
        )


def _check_equal(file: Path, name: str, found: Tensor, expected: Tensor) -> None:
    rows = expected[: len(found)] if _is_of_vocabulary(name) else expected
    if rows.shape != found.shape or not torch.equal(found.to(rows.dtype), rows.cpu()):
        raise SettingsMismatch(
            f"{name} in {file} has other numbers than in the model that prefills; {REMEDY}"
        )


def _is_of_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))
