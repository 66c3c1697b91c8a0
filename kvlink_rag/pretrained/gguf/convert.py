"""GGUF file → model directory of transformers, made once and kept under the file's digest.

    fields → config.json, generation_config.json; tensors → model.safetensors;
    tokens, merges, splitting rule → tokenizer.json, tokenizer_config.json

Knows where the directories lie; knows no field and no tensor by name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from kvlink_rag.disk.atomic_files import private_directory, sync_directory
from kvlink_rag.disk.digests import cache_directory, file_digest
from kvlink_rag.errors import ConfigError, KVLinkError, first_line

from .config import Family, configuration, family_of, weight_names
from .metadata import GGUFFile, read_gguf
from .tokenizer import build_tokenizer, check_loaded, end_ids, special_ids, tokenizer_settings
from .weights import write_weights

logger = logging.getLogger(__name__)

_VERSION = 1  # of what is made of a file: changes with any byte of it


def model_directory(path: Path) -> Path:
    """The directory made of the GGUF file `path`, in the cache; made now if it is not there.

    Named by the file's SHA-256. Whoever is killed in the middle leaves nothing that counts, and of
    several processes at once one does the work. Raises `ConfigError` (damaged) and
    `ModelNotSupported`.
    """
    target = directory_for(file_digest(path))
    if target.is_dir():
        return target
    private_directory(target.parent)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            logger.info("converting %s, once, to %s", path, target)
            _make(path, target)
    return target


def directory_for(sha256: str) -> Path:
    """Where the model of the GGUF file with this digest lies once it is converted."""
    return cache_directory() / "gguf" / f"{sha256}-{_VERSION}"


def directories() -> list[Path]:
    """The converted models that are here."""
    return sorted(
        path for path in (cache_directory() / "gguf").glob(f"*-{_VERSION}") if path.is_dir()
    )


def _make(path: Path, target: Path) -> None:
    """Convert into a directory beside `target`, then give it its name."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one who was killed: we hold the lock
    partial.mkdir(mode=0o700)
    try:
        convert(path, partial)
        _sync(partial)
        os.rename(partial, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert(path: Path, directory: Path) -> None:
    """Write the model of the GGUF file `path` to the empty `directory`."""
    try:
        _convert(read_gguf(path), directory)
    except (KVLinkError, OSError):
        raise
    except Exception as error:  # fields that contradict each other: whatever comes of it
        raise ConfigError(
            f"{path} is no GGUF file that can be converted: {first_line(error)}"
        ) from error


def _convert(file: GGUFFile, directory: Path) -> None:
    family = family_of(file)
    names = weight_names(file, family)
    config, ids = configuration(file, family), _ids(file)
    _write(directory / "config.json", config | ids | {"dtype": _dtype(file, names)})
    _write(directory / "generation_config.json", ids)
    _write(directory / "tokenizer_config.json", tokenizer_settings(file))
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(directory / "tokenizer.json"))
    check_loaded(tokenizer, directory)
    with open(directory / "model.safetensors", "xb", buffering=0) as target:
        write_weights(target, file, names, _heads(config, family))


def _dtype(file: GGUFFile, names: dict[str, str]) -> str:
    """What to compute in, where nobody says: that of most numbers, bfloat16 for quantised ones."""
    counts: dict[str, int] = {}
    for name in names.values():
        tensor = file.tensors[name]
        counts[tensor.type] = counts.get(tensor.type, 0) + tensor.rows.nbytes
    most = max(counts, key=lambda kind: counts[kind])
    return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _heads(config: dict[str, Any], family: Family) -> dict[str, int]:
    """For tensors with interleaved halves: their heads."""
    if not family.interleaved:
        return {}
    counts = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    layers = range(config["num_hidden_layers"])
    return {f"blk.{i}.{name}.weight": count for i in layers for name, count in counts.items()}


def _ids(file: GGUFFile) -> dict[str, Any]:
    """Special ids, as configurations of transformers have them."""
    found: dict[str, Any] = {f"{name}_token_id": i for name, i in special_ids(file).items()}
    found.pop("unk_token_id", None)
    ends = end_ids(file)
    return found | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Put every file of `directory` on the disk."""
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)
