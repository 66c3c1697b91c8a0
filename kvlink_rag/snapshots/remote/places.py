"""Places that keep values by name: a folder, a Redis server, an object store.

A value is written whole or not at all, and is not changed afterwards. Whatever goes wrong is the
client's own exception. Knows clients; knows no snapshot, and not who asks.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, NoReturn, Protocol
from urllib.parse import SplitResult, unquote

from kvlink_rag.disk import atomic_files
from kvlink_rag.errors import ConfigError, MissingExtra

REDIS = ("redis", "rediss", "valkey", "valkeys")
OBJECTS = ("s3", "gs", "az")


class TooLarge(Exception):
    """A value of more bytes than what is asked for can have."""


def _too_large(name: str, most: int) -> NoReturn:
    raise TooLarge(f"{name} has more than the {most:,} bytes that such a snapshot takes")


class Place(Protocol):
    """For any number of threads."""

    def get(self, name: str, most: int) -> bytes | None:
        """The value, or None where there is none. Raises `TooLarge` beyond `most` bytes."""
        ...

    def put(self, name: str, value: bytes) -> None:
        """Keep a value."""
        ...

    def delete(self, name: str) -> None:
        """Remove a value; nothing where there is none."""
        ...


def place_of(url: SplitResult, timeout: float) -> Place:
    """The place at `url`; timeout: seconds of each operation, where the client takes it.

    Raises `ConfigError` for a scheme that there is not, `MissingExtra` without its client.
    """
    if url.scheme == "file":
        return Folder(url)
    if url.scheme in REDIS:
        return Redis(url, timeout)
    if url.scheme in OBJECTS:
        return Objects(url, timeout)
    known = ", ".join(f"{scheme}://" for scheme in ("file", *REDIS, *OBJECTS))
    raise ConfigError(f"found the remote tier {url.scheme!r}, expected one of {known}")


class Folder:
    """A folder, such as one that machines mount."""

    def __init__(self, url: SplitResult) -> None:
        self._root = Path(unquote(url.path))
        if url.netloc or not self._root.is_absolute():
            raise ConfigError(
                "found a file:// URL with a host or without an absolute path, expected "
                "file:///absolute/folder"
            )
        if not self._root.is_dir():
            raise ConfigError(f"there is no folder {self._root}; make or mount it first")

    def get(self, name: str, most: int) -> bytes | None:
        """See `Place`. Neither a link nor a pipe is read."""
        try:
            number = os.open(self._root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with open(number, "rb") as file:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"found {name} to be no regular file")
            return file.read() if found.st_size <= most else _too_large(name, most)

    def put(self, name: str, value: bytes) -> None:
        """See `Place`."""
        path = self._root / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_files.replaced(path) as file:
            atomic_files.write_all(file, memoryview(value))

    def delete(self, name: str) -> None:
        """See `Place`."""
        (self._root / name).unlink(missing_ok=True)


class Redis:
    """A Redis or Valkey server, by redis-py. Who wants old values to go sets its `maxmemory`."""

    def __init__(self, url: SplitResult, timeout: float) -> None:
        try:
            import redis
        except ImportError as error:
            raise MissingExtra.of("redis", "redis", "a remote tier on Redis") from error
        scheme = "rediss" if url.scheme in ("rediss", "valkeys") else "redis"
        self._client: Any = redis.Redis.from_url(
            url._replace(scheme=scheme).geturl(),
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=None,
        )

    def get(self, name: str, most: int) -> bytes | None:
        """See `Place`."""
        found: bytes = self._client.getrange(f"kvlink:{name}", 0, most)  # `most` is among them
        if len(found) > most:
            _too_large(name, most)
        return found or None

    def put(self, name: str, value: bytes) -> None:
        """See `Place`."""
        self._client.set(f"kvlink:{name}", value)

    def delete(self, name: str) -> None:
        """See `Place`."""
        self._client.delete(f"kvlink:{name}")


class Objects:
    """A bucket and a prefix in it, by obstore; credentials and region come from the environment."""

    def __init__(self, url: SplitResult, timeout: float) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            raise MissingExtra.of("obstore", "s3", "a remote tier on an object store") from error
        self._client = obstore
        plain = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        self._store: Any = from_url(
            url.geturl(),
            client_options={
                "timeout": f"{timeout}s",
                "connect_timeout": f"{timeout}s",
                "allow_http": plain,  # options given leave out what the environment says
            },
            retry_config={"max_retries": 0},
        )

    def get(self, name: str, most: int) -> bytes | None:
        """See `Place`."""
        try:
            found = self._client.get(self._store, name)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()) if found.meta["size"] <= most else _too_large(name, most)

    def put(self, name: str, value: bytes) -> None:
        """See `Place`."""
        self._client.put(self._store, name, value)

    def delete(self, name: str) -> None:
        """See `Place`."""
        self._client.delete(self._store, name)
