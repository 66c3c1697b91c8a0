"""What a key and a file name may be, and where a file lies. Knows neither table nor contents.

A key is a SHA-256. A file's name holds its key, so that a lost table is made again from the names,
and a name read back from a table is used only if it is one we would have given.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from kvlink_rag.errors import ConfigError

_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?P<fan>[0-9a-f]{2})/(?P<key>(?P=fan)[0-9a-f]{62})-[0-9a-f]{16}\.safetensors")


class Refused(OSError):
    """A row or a name that is not ours. diskcache takes an OSError for a miss."""


def is_key(key: object) -> bool:
    """Whether `key` is a SHA-256 in hexadecimal."""
    return type(key) is str and _KEY.fullmatch(key) is not None


def checked_key(key: object) -> str:
    """`key`. Raises `ConfigError` where it is none."""
    if not is_key(key):
        raise ConfigError(f"found the key {key!r}, expected 64 hexadecimal digits (snapshot_key)")
    return str(key)


def new_name(key: str) -> str:
    """A name that no file has had, for a file of `key`, relative to the store's directory."""
    return f"{key[:2]}/{key}-{secrets.token_hex(8)}.safetensors"


def key_in(name: object) -> str | None:
    """The key in a file's name; None for any name but one we would have given."""
    match = _NAME.fullmatch(name) if type(name) is str else None
    return match and match["key"]


def locate(directory: Path, name: object, *, make: bool = False) -> Path:
    """The path of a snapshot file in the store `directory`; `make` makes the folder it lies in.

    Raises `Refused` for any name but one we would have given, and where a link would be followed.
    """
    if type(name) is not str or key_in(name) is None:
        raise Refused(f"found the file name {name!r}, expected one of a snapshot")
    parent = directory / name[:2]
    if make:
        parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink():
        raise Refused(f"found {parent} to be a symbolic link, expected a directory")
    return directory / name
