"""Which kind of encoder a directory holds: one place where a new kind is added."""

from __future__ import annotations

from pathlib import Path

from .contriever import ContrieverEmbedder
from .embedder import Embedder
from .recipe import read_recipe
from .sentence_embedder import SentenceEmbedder
from .text_encoder import find_encoder


def load_embedder(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 32,
    local_files_only: bool = False,
) -> Embedder:
    """The encoder of a directory or of the hub, by its own files.

    A `modules.json` says how it pools; an encoder without one is taken for a Contriever. Raises
    `ConfigError` where there is none, `ModelNotSupported` where its files ask for what cannot be
    done.
    """
    directory = find_encoder(path_or_id, local_files_only)
    kind = ContrieverEmbedder if read_recipe(directory) is None else SentenceEmbedder
    return kind.from_pretrained(directory, device=device, batch_size=batch_size)
