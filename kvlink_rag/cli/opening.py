"""The options of every command, and a collection or model opened as they say.

Imports nothing heavy before something is opened, so that help is instant.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from kvlink_rag.arguments import Dtype, Weights
from kvlink_rag.errors import ConfigError

from . import terminal

if TYPE_CHECKING:
    from kvlink_rag.collection.rag import KVLinkRAG
    from kvlink_rag.model.model import KVLinkModel

_EVERY = Group("Options of every command", sort_key=9)


@Parameter(name="*", group=_EVERY)
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of every command; given before or after it."""

    dir: str | None = None
    """the collection's directory"""
    model: str | None = None
    """a directory, GGUF file, hub id, or a name of `models` (the collection's, else small)"""
    embedder: str | None = None
    """likewise for the embedder"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    dtype: Dtype = "auto"
    """to compute in; auto: the model's own, on a CPU float32 where it does not multiply that"""
    weights: Weights = "own"
    """that generated tokens take; int8: a second copy in 8 bits, sooner on a CPU, see verify"""
    remote: str | None = None
    """a tier of snapshots that machines share: redis://…, s3://…, file:///… ($KVLINK_REMOTE)"""
    reencode: bool = False
    """take another model, embedder or codec than the collection's and encode it again"""
    offline: bool = False
    """use no network"""
    debug: bool = False
    """show tracebacks"""
    verbose: Annotated[int, Parameter(name=("--verbose", "-v"), count=True)] = 0
    """say more; twice: say all"""


OPTIONS = Options()  # as given by nobody


def directory_of(options: Options) -> Path:
    """The collection's directory. Raises `ConfigError` where it has no name."""
    if options.dir == "":
        raise ConfigError("--dir is empty, expected a directory; leave it out for the usual one")
    if options.dir is not None:
        return Path(options.dir).expanduser()
    from kvlink_rag.disk.digests import cache_directory

    return cache_directory() / "collection"


@contextmanager
def collection(
    options: Options, *, create: bool = False, models: bool = False, **settings: Any
) -> Iterator[KVLinkRAG]:
    """The collection, open; one that is not there yet is made only if `create`.

    models: whether they will be needed; their libraries, which are slow to start, are imported only
    then. settings: more arguments of `KVLinkRAG.open`. Raises `ConfigError` where there is none.
    """
    directory = directory_of(options)
    if not create and not directory.exists():
        raise ConfigError(
            f"no collection in {directory}; make one with: kvlink-rag index PATH (or give --dir)"
        )
    with importing(options):
        from kvlink_rag.collection.rag import KVLinkRAG

        if models:
            import kvlink_rag.model.model
            import kvlink_rag.retrieval.embedder_kinds  # noqa: F401 (both are needed by `load`)
    with terminal.doing("opening the collection"):
        rag = KVLinkRAG.open(
            directory,
            model=options.model,
            embedder=options.embedder,
            device=options.device,
            dtype=options.dtype,
            weights=options.weights,
            remote=options.remote,
            reencode=options.reencode,
            create=create,
            **settings,
        )
    with rag:
        yield rag


def load(rag: KVLinkRAG, *, embedder: bool = True) -> None:
    """Load model and embedder, and say so: what makes the first answer wait.

    Also tells what the model's spec wants people to know, such as that it is a demonstration.
    embedder: False leaves it until it is needed.
    """
    with terminal.doing(f"loading the model {rag.model_name!r}"):
        notice = rag.model.spec.notice
    if embedder:
        with terminal.doing(f"loading the embedder {rag.embedder_name!r}"):
            _ = rag.embedder
    if notice:
        terminal.note(notice)


def load_model(options: Options) -> KVLinkModel:
    """The model alone, that of the pair small unless named."""
    with importing(options):
        from kvlink_rag.model.model import KVLinkModel
        from kvlink_rag.pretrained.known import DEFAULT
    name = options.model or DEFAULT
    with terminal.doing(f"loading the model {name!r}"):
        return KVLinkModel.from_pretrained(
            name, device=options.device, dtype=options.dtype, weights=options.weights
        )


def opener(
    options: Options, *, codec: str | None, compression: str | None
) -> Callable[[Path], KVLinkRAG]:
    """Opens empty collections like the one that `index` would make; the model is loaded once."""
    with importing(options):
        from kvlink_rag.collection.rag import KVLinkRAG
        from kvlink_rag.model.model import KVLinkModel
        from kvlink_rag.pretrained.known import DEFAULT
    known: dict[str, str] = {}
    if has_collection(options):
        with KVLinkRAG.open(directory_of(options), create=False) as rag:
            known = {"model": rag.model_name, "embedder": rag.embedder_name, "codec": rag.codec}
            known |= {"compression": rag.compression, "dtype": rag.storage_dtype}
    name = options.model or known.get("model", DEFAULT)
    with terminal.doing(f"loading the model {name!r}"):
        model = KVLinkModel.from_pretrained(name, device=options.device, dtype=options.dtype)
    kept, computed = known.get("dtype"), model.backbone.dtype_name
    if known.get("codec") == "exact" and kept in ("bfloat16", "float16") and kept != computed:
        known["codec"] = "bf16"  # as many bytes as those that were made elsewhere
    return lambda path: KVLinkRAG.open(
        path,
        model=model,
        embedder=options.embedder or known.get("embedder", DEFAULT),
        device=options.device,
        codec=codec or known.get("codec"),
        compression=compression or known.get("compression"),
    )


def require_documents(rag: KVLinkRAG) -> None:
    """Raise `ConfigError` where there is nothing to answer from."""
    if not len(rag):
        raise ConfigError(f"{rag.directory} holds no documents; add some: kvlink-rag index PATH")


def has_collection(options: Options) -> bool:
    """Whether a collection is there, or what is left of one that lost its catalog."""
    directory = directory_of(options)
    if not directory.exists():
        return False
    from kvlink_rag.collection.opening import CATALOG, INDEX, SNAPSHOTS

    parts = (directory / name for name in (CATALOG, INDEX, SNAPSHOTS))
    return directory.is_file() or any(part.exists() for part in parts)


@contextmanager
def importing(options: Options) -> Iterator[None]:
    """Imports of large libraries, said on a terminal.

    What they make stays to the end of the process, so the garbage collector leaves it alone: to
    walk over it, while it grew and at the end, took a third of the time of `ask`.
    """
    first = gc.isenabled() and "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        with terminal.doing("loading libraries"):
            _hush(options)
            yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


def _hush(options: Options) -> None:
    """No bars and remarks of transformers around our output, unless asked for."""
    if options.verbose:
        return
    if "transformers" not in sys.modules:  # it looks there once it is imported, by who needs it
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
