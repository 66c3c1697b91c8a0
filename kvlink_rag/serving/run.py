"""From settings to a server that listens, until a signal ends it.

    keys, hosts, collections checked → socket and directory claimed → models loaded → served

Everything that can be wrong with the settings is told before a model is loaded. Knows uvicorn.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import python_multipart  # noqa: F401 (Starlette reads forms with it, and asks for it too late)
import uvicorn

from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.model import KVLinkModel
from kvlink_rag.retrieval.embedder import Embedder

from .app import make_app
from .guard import LOCAL, access
from .keys import EVERYBODY, VARIABLE, Keys
from .library import STORE_PREFIX, Library, claim
from .runner import Limits
from .service import Service

GRACE = 5.0  # seconds beyond the time limit of a request that the end of the server waits

Load = Callable[[str | None, str | None], tuple[KVLinkModel, Embedder]]


def serve(
    collections: Sequence[Path],
    data: Path,
    load: Load,
    *,
    host: str,
    port: int,
    keys: Keys,
    host_names: Collection[str] = (),
    limits: Limits,
    k: int,
    remote: str | None = None,
    say: Callable[[str], object],
) -> None:
    """Serve until SIGTERM or SIGINT; what runs then is finished.

    load: loads model and embedder, by the names that the collections remember, if there are any.
    remote: as in `Library`. say: told the address once it listens. Raises `ConfigError`,
    `StorageError` and what `load` raises.
    """
    hosts = allowed_hosts(host, keys, host_names)
    given = named(collections)
    stores = data / "stores"
    made = sorted(stores.iterdir()) if stores.is_dir() else []
    known = remembered([*given.values(), *made])
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(bound(host, port))
        lock = claim(data)
        stack.callback(lock.release)
        library = Library(*load(*known), data, given, lock, remote)
        stack.callback(library.close)
        service = Service.of(library, keys, limits, k=k)
        for id in given:  # another model than the one that made it is told now
            with library.using(id):
                pass
        app = make_app(service, hosts=hosts)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",  # nothing here speaks WebSocket
            timeout_graceful_shutdown=round(limits.patience + limits.seconds + GRACE),
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        access.setLevel(logging.INFO)
        say(f"http://{_address(listening)}/v1 serves {', '.join(_models(service))}")
        with _terminated_quietly():
            uvicorn.Server(config).run(sockets=[listening])


def allowed_hosts(host: str, keys: Keys, names: Collection[str]) -> Collection[str] | None:
    """What `Host` may be; None: anything. Raises `ConfigError` where a key is needed and none is.

    Without a key only this machine may ask, and under no name but its own.
    """
    if _is_loopback(host):
        return {*LOCAL, *names}
    if not keys:
        raise ConfigError(
            f"{host} can be reached from other machines, which needs a key; set {VARIABLE} (make a "
            "key with: openssl rand -hex 24), or listen on 127.0.0.1"
        )
    return set(names) or None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise ConfigError(f"found host {host!r}, expected an address such as 127.0.0.1") from error


def named(collections: Sequence[Path]) -> dict[str, Path]:
    """Collections by the names of their directories. Raises `ConfigError` where they clash."""
    found: dict[str, Path] = {}
    for path in collections:
        name = path.resolve().name
        if not path.is_dir():
            raise ConfigError(f"no collection in {path}; make one with: kvlink-rag index PATH")
        if found.setdefault(name, path) != path:
            raise ConfigError(f"{found[name]} and {path} are both called {name!r}; rename one")
        if name.startswith(STORE_PREFIX):
            raise ConfigError(f"{path} is called like a client's store; rename it")
    return found


def remembered(collections: Sequence[Path]) -> tuple[str | None, str | None]:
    """Their model and embedder, if there are any. Raises `ConfigError` where they have several."""
    found: dict[tuple[str, str], Path] = {}
    for path in collections:
        with KVLinkRAG.open(path, create=False) as rag:
            found.setdefault((rag.model_name, rag.embedder_name), path)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ConfigError(
            f"{first} was made with {', '.join(one)}, {second} with {', '.join(other)}; a server "
            "has one model and one embedder: serve them apart, or encode one again (--reencode)"
        )
    return next(iter(found), (None, None))


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises `ConfigError` where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; give another") from error
    with listening:
        # asyncio only sets it where the socket names its protocol; without it each piece of an
        # answer waits 40 ms for the client's acknowledgement of the one before
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _models(service: Service) -> list[str]:
    return [*service.library.model_names(EVERYBODY), service.reader_name]


@contextlib.contextmanager
def _terminated_quietly() -> Iterator[None]:
    """uvicorn raises SIGTERM again once it has finished; then there is nothing left to end."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
