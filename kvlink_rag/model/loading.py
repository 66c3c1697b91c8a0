"""Names to loaded things: directories, hub ids and "bundled" to configuration, weights, tokenizer.

Knows where model files are and how transformers loads them; code from a repository is never run.
`HF_HUB_OFFLINE` is honoured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvlink_rag.engine.attention import NAME as GROUPED
from kvlink_rag.errors import ConfigError, ModelNotSupported
from kvlink_rag.prompt.spec import PUBLISHED, SPEC_FILE, Spec

from . import gguf

BUNDLED = "bundled"
BUNDLED_DIRECTORY = Path(__file__).parents[1] / "bundled"

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(name: str | Path, *, bundled: str, files: list[str] | None = None) -> Path:
    """The directory that holds the model `name`, fetched from the hub if it is an id there.

    bundled: the folder of the bundled pair ("lm" or "encoder") that the name "bundled" means.
    Raises `ConfigError` where there is no such directory and no such repository at hand.
    """
    if str(name) == BUNDLED:
        return BUNDLED_DIRECTORY / bundled
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf" and path.is_file():
        return gguf.model_directory(path.resolve())
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise ConfigError(f"no model directory at {path}; give a directory or a hub id owner/name")
    return _snapshot(str(name), files or _FILES)


def _snapshot(repository: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the model {repository!r} is neither a directory here nor to be had from the hub "
            f"({type(error).__name__}: {reason}); go online, log in with `hf auth login` where the "
            "repository is gated, or give the path of a directory"
        ) from error


def find_spec(name: str, directory: Path) -> Spec | None:
    if (directory / SPEC_FILE).is_file():
        return Spec.load(directory / SPEC_FILE)
    return PUBLISHED.get(name)


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
            raise ModelNotSupported(f"{directory}: {_first_line(error)}") from error
        raise ConfigError(f"{directory} holds no model: {_first_line(error)}") from error


@contextlib.contextmanager
def quiet(directory: Path) -> Iterator[None]:
    """No progress bars of transformers while the bundled pair loads, which takes no time."""
    hush = directory.is_relative_to(BUNDLED_DIRECTORY) and logging.is_progress_bar_enabled()
    if hush:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hush:
            logging.enable_progress_bar()


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
            f"the weights in {directory} cannot be loaded: {_first_line(error)}; "
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
        raise ConfigError(f"no tokenizer in {directory}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def find_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}, expected 'auto', 'cpu' or 'cuda[:n]'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but this torch sees no CUDA device; use 'cpu'")
    return found


def find_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype is {dtype!r}, expected 'auto', 'float32', 'bfloat16', 'float16'")
    return found
