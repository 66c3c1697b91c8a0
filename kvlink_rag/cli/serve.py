"""`kvlink-rag serve`: collections over HTTP, as OpenAI's API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from kvlink_rag.errors import ConfigError, MissingExtra

from . import terminal
from .opening import OPTIONS, Options, directory_of, importing
from .values import Count, CountOrAll, Size

if TYPE_CHECKING:
    from kvlink_rag.model.model import KVLinkModel
    from kvlink_rag.retrieval.embedder import Embedder


def serve(
    *collections: Path,
    host: str = "127.0.0.1",
    port: CountOrAll = 8321,
    host_name: Annotated[tuple[str, ...], Parameter(name="--host-name")] = (),
    data: Path | None = None,
    k: Annotated[Count, Parameter(name="-k")] = 10,
    at_once: Count = 8,
    waiting: CountOrAll = 64,
    seconds: Count = 600,
    max_tokens: Count = 4096,
    max_upload: Size = 64 << 20,
    options: Options = OPTIONS,
) -> int:
    """Serve collections over HTTP, as OpenAI's API.

    For openai-python, LangChain's ChatOpenAI, LlamaIndex's OpenAILike, Open WebUI and curl: the
    model kvlink/NAME retrieves from the collection NAME and answers; the reader's own name answers
    prompts that clients built, and reuses the passages it recognises in them. Listens on this
    machine only, without keys; keys are in the variable KVLINK_API_KEYS (docs/serving.md). Needs
    kvlink-rag[serve].

    Args:
        collections: directories of collections, called by their last part; the one of --dir, unless
            named
        host: the address to listen on; one that other machines reach needs keys
        port: the port; 0 takes a free one
        host_name: another name that clients call this server by
        data: for uploads and the stores that clients make (serve, beside the usual collection)
        k: passages to retrieve, where a request does not say
        at_once: answers computed side by side
        waiting: requests that may wait for their turn
        seconds: the most that one request may take
        max_tokens: the most tokens of an answer
        max_upload: the most bytes of an uploaded file
    """
    with importing(options):
        try:
            from kvlink_rag.serving.keys import VARIABLE, Keys
            from kvlink_rag.serving.run import serve as run
            from kvlink_rag.serving.runner import Limits
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "kvlink_rag"):
                raise
            raise MissingExtra.of(package, "serve", "Serving over HTTP") from error
        from kvlink_rag.disk.digests import cache_directory
    if options.reencode:
        raise ConfigError("serve encodes nothing again; run before it: kvlink-rag check --reencode")
    if options.dir is not None or (not collections and directory_of(options).exists()):
        collections = (directory_of(options), *collections)

    def load(model: str | None, embedder: str | None) -> tuple[KVLinkModel, Embedder]:
        return _load(options, options.model or model, options.embedder or embedder)

    run(
        collections,
        data.expanduser() if data is not None else cache_directory() / "serve",
        load,
        host=host,
        port=port,
        keys=Keys.parse(os.environ.get(VARIABLE, "")),
        host_names=host_name,
        limits=Limits(
            at_once=at_once,
            waiting=waiting,
            seconds=seconds,
            tokens=max_tokens,
            upload=max_upload,
        ),
        k=k,
        remote=options.remote,
        say=terminal.above(False),
    )
    return 0


def _load(
    options: Options, model: str | None, embedder: str | None
) -> tuple[KVLinkModel, Embedder]:
    from kvlink_rag.model.model import KVLinkModel
    from kvlink_rag.pretrained.known import DEFAULT
    from kvlink_rag.retrieval.embedder_kinds import load_embedder

    name = model or DEFAULT
    with terminal.doing(f"loading the model {name!r}"):
        reader = KVLinkModel.from_pretrained(
            name, device=options.device, dtype=options.dtype, weights=options.weights
        )
    other = embedder or DEFAULT
    with terminal.doing(f"loading the embedder {other!r}"):
        return reader, load_embedder(other, device=options.device)
