"""What an evaluation is asked for: plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

By = Literal["kind", "passages"]
GROUPS: tuple[By, ...] = get_args(By)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which questions, in which modes, how they are prompted and where the answers go.

    set: its name in `datasets.sets`; data: a file, folder or hub id with its rows, instead of its
    own. first, limit: examples left out, and asked at most. prompt, rank: of the model's spec.
    documents: filled up to so many a question. gold_at: places of the one gold document. retrieve:
    ask over so many passages of `corpus` (None: of all examples) that `embedder` finds.
    """

    set: str
    out: Path
    data: str | None = None
    split: str | None = None
    first: int = 0
    limit: int | None = None
    modes: tuple[str, ...] = ("full", "masked", "reuse")
    prompt: str | None = None
    rank: Literal["none", "fixed", "exact"] | None = None
    documents: int | None = None
    gold_at: tuple[int, ...] = ()
    by: tuple[By, ...] = ()
    retrieve: int | None = None
    corpus: str | None = None
    embedder: str | None = None
    device: str = "auto"
    batch: int = 8
    max_new_tokens: int = 200
    on_bad: Literal["skip", "refuse"] = "skip"
    seed: int = 0
