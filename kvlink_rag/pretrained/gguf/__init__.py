"""GGUF files of llama.cpp as model directories of transformers. Knows no prompt and no snapshot."""

from __future__ import annotations

from .convert import directories, directory_for, model_directory

__all__ = ["directories", "directory_for", "model_directory"]
