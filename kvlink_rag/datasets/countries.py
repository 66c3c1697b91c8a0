"""The demonstration's passages and questions: countries, from The World Factbook.

Knows their files, beside which `SOURCE.md` says where they are from and what was changed; no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.documents import Document

from .answers import ABSENT, contained

SOURCE = "The World Factbook"
DIRECTORY = Path(__file__).parent / "factbook"


@dataclass(frozen=True, slots=True)
class Question:
    """answers: those that count as right, none where no passage holds one. gold: ids of passages
    that do.
    """

    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]

    def is_right(self, said: str) -> bool:
        """Whether `said` holds one of the answers, or says that the documents do not."""
        return contained(said, self.answers or (ABSENT,))


def passages() -> list[Document]:
    """One or two short passages for each country."""
    return [Document(**row, metadata={"source": SOURCE}) for row in _rows("passages.jsonl")]


def questions() -> list[Question]:
    """What the demonstration asks."""
    return [
        Question(row["question"], tuple(row["answers"]), tuple(row["gold"]))
        for row in _rows("questions.jsonl")
    ]


def _rows(name: str) -> Iterator[dict[str, Any]]:
    lines = (DIRECTORY / name).read_text(encoding="utf-8").splitlines()
    return map(json.loads, lines)
