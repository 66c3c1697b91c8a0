"""A server over the tiny pair for tests: real HTTP on a free port of this machine."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trust
import uvicorn
from conftest import WordEmbedder

from kvlink_rag import KVLinkRAG
from kvlink_rag.serving.app import make_app
from kvlink_rag.serving.keys import Keys
from kvlink_rag.serving.library import Library
from kvlink_rag.serving.run import bound
from kvlink_rag.serving.runner import Limits
from kvlink_rag.serving.service import Service

READER, EMBEDDER = "tiny-0", "word-embedder"
TOWNS = [trust.document_of(random.Random(n), name.lower()) for n, name in enumerate(trust.NAMES)]


@dataclass(frozen=True)
class Running:
    """A server that listens. root: `towns` lies there, a collection that it was given."""

    url: str
    service: Service
    root: Path

    def client(self, key: str | None = None, **arguments: Any) -> httpx.Client:
        """A plain HTTP client of it."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **arguments)

    @contextlib.contextmanager
    def towns(self) -> Iterator[KVLinkRAG]:
        """The given collection, as the server has it."""
        with self.service.library.using("towns") as rag:
            yield rag


def make_towns(root: Path) -> None:
    with trust.open_tiny(root / "towns") as rag:
        rag.add(trust.as_documents(TOWNS))


@contextlib.contextmanager
def running(root: Path, *, keys: str = "", hosts: Any = None, **limits: Any) -> Iterator[Running]:
    """A server over `root`, where `make_towns` was, until the block ends."""
    library = Library(trust.tiny_model(), WordEmbedder(), root / "data", {"towns": root / "towns"})
    service = Service.of(library, Keys.parse(keys), Limits(**limits), k=3)
    app = make_app(service, **({} if hosts is None else {"hosts": hosts}))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    with bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, root)
        finally:
            server.should_exit = True
            thread.join()
