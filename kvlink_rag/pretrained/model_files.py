"""Where model files lie, and on which device and in which dtype they are to be loaded.

Directories, GGUF files, hub ids and known names to a directory. Knows no kind of model.
`HF_HUB_OFFLINE` is honoured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from kvlink_rag.errors import ConfigError

from . import fetch, gguf
from .known import PAIRS, Role

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(name: str | Path, *, role: Role, files: list[str] | None = None) -> Path:
    """The directory that holds the model `name`.

    That is a directory, a GGUF file, a known pair or a part of one by its own name, or a hub id.
    What is not here is fetched, a GGUF file converted once. role: the part that the name of a pair
    means; its reader is the base alone, without the pair's adapter.
    Raises `ConfigError` where there is no such directory and no such repository at hand.
    """
    if str(name) in PAIRS:
        return fetch.part(str(name), role)
    if packaged := fetch.named(str(name)):
        return fetch.directory_of(packaged)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf" and path.is_file():
        return gguf.model_directory(path.resolve())
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise ConfigError(
            f"no model directory at {path}; give a directory, a GGUF "
            f"file, a hub id owner/name or one of {', '.join(PAIRS)} (kvlink-rag models)"
        )
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


@contextlib.contextmanager
def quiet(directory: Path) -> Iterator[None]:
    """No progress bars of transformers while a known pair loads, which takes a second."""
    from transformers.utils import logging

    hush = fetch.is_packaged(directory) and logging.is_progress_bar_enabled()
    if hush:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hush:
            logging.enable_progress_bar()


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
