"""What every endpoint works with, and how one is described. Knows no endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from .answers import BareReader
from .keys import Asker, Keys
from .library import Library
from .records import now
from .runner import Limits, Runner
from .shelf import Shelf
from .tally import Tally

DEFAULT_K = 10
DEFAULT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of a running server. k: passages retrieved where a request does not say."""

    library: Library
    keys: Keys
    limits: Limits
    runner: Runner
    shelf: Shelf
    reader: BareReader
    tally: Tally
    k: int = DEFAULT_K
    started: int = field(default_factory=now)

    @classmethod
    def of(cls, library: Library, keys: Keys, limits: Limits, *, k: int = DEFAULT_K) -> Service:
        """A server over `library`; nothing runs before `app`'s lifespan begins."""
        return cls(
            library,
            keys,
            limits,
            Runner(limits),
            Shelf(library, limits.upload),
            BareReader(library.model),
            Tally(),
            k,
        )

    def close(self) -> None:
        """Let what runs finish, then close the collections."""
        self.runner.close()
        self.shelf.close()
        self.library.close()

    @property
    def reader_name(self) -> str:
        """The language model's name; of a path its last part, since paths are not told."""
        return _shown(self.library.model.name)

    @property
    def embedder_name(self) -> str:
        """The embedder's."""
        return _shown(str(getattr(self.library.embedder, "name", "") or "embedder"))


def _shown(name: str) -> str:
    return PurePath(name).name if PurePath(name).is_absolute() else name


@dataclass(frozen=True, slots=True)
class Call:
    """One request, checked: who asks, and what. path: the parts of the path in braces."""

    service: Service
    asker: Asker
    request: Request
    path: Mapping[str, str]
    body: Any = None
    query: Any = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A method and a path, what it takes and gives, and the function that serves it.

    serve: takes a `Call`; a coroutine, or a plain function that runs in a thread. answer: None
    where it is no JSON. form: whether the body is multipart. sse: whether it may be a stream.
    open: whether no key is asked for.
    """

    method: str
    path: str
    serve: Callable[[Call], Any]
    summary: str
    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    form: bool = False
    sse: bool = False
    open: bool = False
    media: str = "application/json"
