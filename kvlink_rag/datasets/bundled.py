"""The documents and questions that come with the package. Knows their files; no model.

`training.demo` makes the files, and says what their lines hold.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Example:
    """A bundled question: its expected answer, and the ids of the documents it rests on."""

    question: str
    answer: str
    kind: str
    gold: tuple[str, ...]


def load_documents(directory: Path) -> list[Document]:
    """The bundled documents. Raises `ConfigError` without their file."""
    return [Document(**row) for row in _rows(directory / "documents.jsonl")]


def load_examples(directory: Path) -> list[Example]:
    """The bundled questions, of all kinds in turn. Raises `ConfigError` without their file."""
    return [
        Example(**{**row, "gold": tuple(row["gold"])})
        for row in _rows(directory / "questions.jsonl")
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing; it is part of the package, or made by: make train-small"
        ) from error
