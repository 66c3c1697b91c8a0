"""Digests of weights and tokenizers: which model made a snapshot or a vector.

A digest is SHA-256 in hexadecimal and the same in every process and on every machine. Those of
weight files are kept by path, inode, size and times in a small file under the cache directory
(`KVLINK_CACHE_DIR`, else the user's), so that opening a model does not read 16 GB each time.
Knows bytes; knows no architecture.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch

from kvlink_rag.errors import ConfigError

from . import atomic_files

logger = logging.getLogger(__name__)

DIGESTS = "weight-digests.json"
_FORMAT = 1
_SETTLED_SECONDS = 2.0  # a file younger than this may change again within its clock's tick
_KEPT = 512  # files remembered
_PROBE = (  # case, accents, ligatures, digits, spaces, scripts, special tokens as text
    "The QUICK brown fox, naïve café  ﬁ ½ 1234567 3.14\t\n[CLS] <s> </s> <|eot_id|> [MASK] "
    "don't e.g. well-known über Straße Ελλάδα Россия 日本語 한국어 العربية हिन्दी "
    "👩🏽‍🚀 e\u0301 \u00a0x"
)
FileStates = dict[str, list[int]]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def weights_digest(path: Path) -> str:
    """SHA-256 over the weight files of the model directory `path`: names and contents.

    The files are those transformers loads: `model.safetensors`, else the shards its index names,
    else the same of `pytorch_model.bin`. Raises `ConfigError` where there are none, `OSError`
    where one cannot be read.
    """
    path = Path(path)
    names = _weight_files(path)
    known = _load_known()
    kept = dict(known)
    digests = [_file_digest(path / name, kept) for name in names]
    if kept != known:
        _save_known(kept)
    text = "".join(f"{name}\0{digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()


def weight_states(path: Path) -> FileStates:
    """What changes when a weight file of the model directory `path` does, by name.

    Raises `ConfigError` where there are none, `OSError` where one cannot be looked at.
    """
    path = Path(path)
    return {name: _state(os.path.realpath(path / name)) for name in _weight_files(path)}


def file_digest(path: Path) -> str:
    """SHA-256 of the file `path`, kept like those of weight files. Raises `OSError`."""
    known = _load_known()
    kept = dict(known)
    digest = _file_digest(Path(path), kept)
    if kept != known:
        _save_known(kept)
    return digest


def module_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the parameters and buffers of `module`: names, dtypes, shapes and values.

    A tensor that several names share (tied weights) counts once, under its first name. Raises
    `ConfigError` for a module on the meta device, which has no values.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(module):
        if tensor.is_meta:
            raise ConfigError(f"the parameter {name!r} has no values; load the weights first")
        facts = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(facts).encode())
        data = tensor.detach().cpu().contiguous().view(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over a Hugging Face tokenizer: vocabulary, merges and what it makes of a probe.

    Not over its files or its serialised form, which change with the library's release.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
    probed = copy.deepcopy(tokenizer)(_PROBE, split_special_tokens=True, verbose=False)
    facts = [sorted(tokenizer.get_vocab().items()), merges, probed["input_ids"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cache_directory() -> Path:
    """Where this package keeps what can be made again: `KVLINK_CACHE_DIR`, else the user's."""
    chosen = os.environ.get("KVLINK_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("kvlink-rag"))


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, by name; each piece of memory once."""
    seen = set()
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.is_meta or not tensor.numel() or place not in seen:
                seen.add(place)
                yield name, tensor


def _weight_files(path: Path) -> list[str]:
    """Names of the weight files in `path`, sorted."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            return [name]
        if (path / f"{name}.index.json").is_file():
            return _shards(path / f"{name}.index.json")
    raise ConfigError(f"found no weights in {path}, expected {_WEIGHTS[0]} (or its shards)")


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not an index of weight files: {error!r}") from error
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ConfigError(f"{index} names no weight files beside it; fetch the model again")
    return sorted(names)


def _file_digest(path: Path, known: dict[str, list[Any]]) -> str:
    """The digest of one file: the known one if the file is unchanged, else by reading it."""
    place = os.path.realpath(path)
    found = _state(place)
    entry = known.pop(place, None)
    if entry is None or entry[:-1] != found:
        with open(place, "rb") as file:
            entry = [*found, _sha256(file)]
    settled = time.time() - max(found[2:]) / 1e9 > _SETTLED_SECONDS
    if settled and _state(place) == found:
        known[place] = entry
    return str(entry[-1])


def _state(place: str) -> list[int]:
    """What changes when a file does: inode, bytes, mtime and ctime in ns."""
    found = os.stat(place)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def _load_known() -> dict[str, list[Any]]:
    """The digests kept so far; none where the file is missing, damaged or of another format."""
    try:
        kept = json.loads((cache_directory() / DIGESTS).read_text(encoding="utf-8"))
        entries = kept["files"] if kept["format"] == _FORMAT else {}
        return {place: entry for place, entry in entries.items() if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and all(type(number) is int for number in entry[:4])
        and isinstance(entry[4], str)
        and re.fullmatch(r"[0-9a-f]{64}", entry[4]) is not None
    )


def _save_known(known: dict[str, list[Any]]) -> None:
    """Keep `known`, the latest last. Two processes at once: one of them may hash again later."""
    kept = dict(list(known.items())[-_KEPT:])
    data = json.dumps({"format": _FORMAT, "files": kept}, indent=1).encode()
    with contextlib.suppress(OSError):
        directory = cache_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_files.replaced(directory / DIGESTS) as file:
            atomic_files.write_all(file, memoryview(data))
        return
    logger.debug("the digests of weight files cannot be kept in %s", cache_directory())
