"""A name to a loaded model: configuration, spec, tokenizer, weights.

Knows how transformers loads them; code from a repository is never run. `pretrained.model_files`
knows where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvlink_rag.engine.attention import NAME as GROUPED
from kvlink_rag.engine.families import check_supported, reach_of
from kvlink_rag.engine.processor import computing_dtype
from kvlink_rag.errors import ConfigError, ModelNotSupported, first_line
from kvlink_rag.pretrained.model_files import quiet, resolve
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.published import PUBLISHED
from kvlink_rag.prompt.spec import SPEC_FILE, Spec

from .adapter import Adapter, find_adapter

DERIVED = ("rotary_emb.inv_freq", "masked_bias")  # buffers that old checkpoints hold, made anew


def find_spec(name: str, directory: Path) -> Spec | None:
    if (directory / SPEC_FILE).is_file():
        return Spec.load(directory / SPEC_FILE)
    return PUBLISHED.get(name)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What is known of a model before its weights are read; adapter: to be merged into them."""

    format: PromptFormat
    directory: Path
    adapter: Adapter | None

    @property
    def merged(self) -> str:
        """The digest of what is merged into the weights, or ""."""
        return self.adapter.digest if self.adapter else ""

    @property
    def links(self) -> str:
        """The digest of link tokens and markers that were trained, or ""."""
        return self.adapter.links if self.adapter else ""

    def check_base(self, adapter_base: str | None) -> str:
        """What is to be said of the adapter on this base; see `Adapter.check`."""
        if self.adapter is None:
            return ""
        tokenizer = self.format.tokenizer.hf
        return self.adapter.check(self.directory, tokenizer, adapter_base=adapter_base)


def find_model(
    path_or_id: str | Path, spec: Spec | None = None, adapter: str | Path | None = None
) -> ModelFiles:
    """The files of a directory, a hub id, an adapter or a pair, and how its prompts are written.

    spec: None takes the adapter's, else the `kvlink.json` beside the weights, else the built-in one
    of a published checkpoint, else one without link tokens.
    Raises `ConfigError` (nothing to load), `ModelNotSupported`, `SpecError`.
    """
    base, found = find_adapter(path_or_id, adapter)
    directory = resolve(base, role="reader")
    config = load_config(directory)
    check_supported(config)
    spec = spec or (found.spec if found else find_spec(str(base), directory))
    tokenizer = load_tokenizer(directory, spec)
    window = reach_of(config)
    return ModelFiles(PromptFormat.of(str(path_or_id), window, tokenizer, spec), directory, found)


def load_config(directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} holds no model: there is no config.json in it")
    if (directory / "adapter_config.json").is_file():
        raise ConfigError(
            f"{directory} holds an adapter, which transformers would load over other weights than "
            "those here; merge it into the model (PEFT: merge_and_unload) and save that"
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "model_type" in str(error) or "architecture" in str(error):
            raise ModelNotSupported(f"{directory}: {first_line(error)}") from error
        raise ConfigError(f"{directory} holds no model: {first_line(error)}") from error


def load_model(directory: Path, dtype: torch.dtype | str, device: torch.device) -> Any:
    """The model in `directory`, in memory; dtype "auto": as suits its weights and `device`."""
    with quiet(directory):
        if dtype != "auto":
            return _load_model(directory, dtype)
        own = load_config(directory).dtype
        if own is None:  # transformers reads it from the weights
            model = _load_model(directory, dtype)
            return model.to(computing_dtype(model.dtype, device))
        return _load_model(directory, computing_dtype(own, device))


def _load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=GROUPED,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the weights in {directory} cannot be loaded: {first_line(error)}; "
            "expected safetensors files"
        ) from error
    _refuse_other_tensors(directory, info)
    return model


def _refuse_other_tensors(directory: Path, info: Mapping[str, Any]) -> None:
    """Raise where the files lack a tensor, which would be drawn at random, or hold others."""
    for what, name in (("lack", "missing_keys"), ("also hold", "unexpected_keys")):
        if found := sorted(key for key in info[name] if not key.endswith(DERIVED)):
            named = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            raise ConfigError(
                f"the weights in {directory} {what} {named}; expected exactly the tensors of this "
                "architecture: fetch the checkpoint again, or save it as it was loaded"
            )


def load_tokenizer(directory: Path, spec: Spec | None) -> Any:
    """The checkpoint's tokenizer, or the one its spec names where it carries none."""
    if not _carries_tokenizer(directory) and spec is not None and spec.tokenizer is not None:
        directory = resolve(
            spec.tokenizer, role="reader", files=["tokenizer*", "*.jinja", "special*"]
        )
    if not _carries_tokenizer(directory):  # transformers 5.0 would make an empty one
        raise ConfigError(
            f"no tokenizer in {directory}, expected a tokenizer.json or tokenizer.model"
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {directory}, expected a tokenizer.json or tokenizer.model: "
            f"{first_line(error)}"
        ) from error


def _carries_tokenizer(directory: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return any((directory / name).is_file() for name in names)
