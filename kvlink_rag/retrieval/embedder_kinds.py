"""Which kind of encoder a directory holds: one place where a new kind is added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .contriever import ContrieverEmbedder
from .embedder import Embedder
from .recipe import MODULES
from .sentence_embedder import SentenceEmbedder
from .text_encoder import find_encoder

# Whether a directory is of the kind, and the kind; the first counts, and the last takes any.
KINDS: tuple[tuple[Callable[[Path], bool], Callable[..., Any]], ...] = (
    (lambda directory: (directory / MODULES).is_file(), SentenceEmbedder.from_pretrained),
    (lambda directory: True, ContrieverEmbedder.from_pretrained),
)


def load_embedder(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 32,
    local_files_only: bool = False,
) -> Embedder:
    """The encoder of a directory, of the hub or of a known pair, by its own files.

    A `modules.json` says how it pools; an encoder without one is taken for a Contriever. Raises
    `ConfigError` where there is none, `ModelNotSupported` where its files ask for what cannot be
    done.
    """
    directory = find_encoder(path_or_id, local_files_only)
    load = next(load for is_kind, load in KINDS if is_kind(directory))
    encoder = load(directory, device=device, batch_size=batch_size)
    encoder.name = str(path_or_id)
    found: Embedder = encoder
    return found
