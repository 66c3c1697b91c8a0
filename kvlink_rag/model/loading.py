"""A name to a loaded model: configuration, spec, tokenizer, weights.

Knows how transformers loads them; code from a repository is never run. `disk.model_files` knows
where they lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvlink_rag.disk.model_files import first_line, quiet, resolve
from kvlink_rag.engine.attention import NAME as GROUPED
from kvlink_rag.engine.families import check_supported
from kvlink_rag.errors import ConfigError, ModelNotSupported
from kvlink_rag.prompt.format import PromptFormat
from kvlink_rag.prompt.published import PUBLISHED
from kvlink_rag.prompt.spec import SPEC_FILE, Spec


def find_spec(name: str, directory: Path) -> Spec | None:
    if (directory / SPEC_FILE).is_file():
        return Spec.load(directory / SPEC_FILE)
    return PUBLISHED.get(name)


def load_format(path_or_id: str | Path, spec: Spec | None = None) -> tuple[PromptFormat, Path]:
    """The prompt format of a directory, a hub id or "bundled", and the directory of its weights.

    spec: None takes the `kvlink.json` beside the weights, else the built-in one of a published
    checkpoint, else one without link tokens.
    Raises `ConfigError` (nothing to load), `ModelNotSupported`, `SpecError`.
    """
    directory = resolve(path_or_id, bundled="lm")
    config = load_config(directory)
    check_supported(config)
    spec = spec or find_spec(str(path_or_id), directory)
    tokenizer = load_tokenizer(directory, spec)
    window = int(config.max_position_embeddings)
    return PromptFormat.of(str(path_or_id), window, tokenizer, spec), directory


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
    except (OSError, ValueError) as error:
        if "model_type" in str(error) or "architecture" in str(error):
            raise ModelNotSupported(f"{directory}: {first_line(error)}") from error
        raise ConfigError(f"{directory} holds no model: {first_line(error)}") from error


def load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    with quiet(directory):
        return _load_model(directory, dtype)


def _load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=GROUPED,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the weights in {directory} cannot be loaded: {first_line(error)}; "
            "expected safetensors files"
        ) from error


def load_tokenizer(directory: Path, spec: Spec | None) -> Any:
    """The checkpoint's tokenizer, or the one its spec names where it carries none."""
    carries = any((directory / f).is_file() for f in ("tokenizer.json", "tokenizer.model"))
    if not carries and spec is not None and spec.tokenizer is not None:
        directory = resolve(
            spec.tokenizer, bundled="lm", files=["tokenizer*", "*.jinja", "special*"]
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {directory}, expected a tokenizer.json or tokenizer.model: "
            f"{first_line(error)}"
        ) from error
