"""Answers as they lie on disk: one JSON line for each example and mode, under known settings.

`settings.json` says under what the answers were made; other settings are refused, so that one
directory never holds two experiments. A line that an interrupted run left unfinished is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvlink_rag.errors import ConfigError, StorageError

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"


@dataclass(frozen=True, slots=True)
class Record:
    """One answer. key: the example, and after `@` the place of its gold document, if that is set.

    margins: see `Decoded`. recall: of retrieved documents, else None. Times in milliseconds. kind:
    of question, "" where the set has no kinds. passages: in the prompt, before it was closed.
    """

    data_set: str
    model: str
    mode: str
    key: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    scores: Mapping[str, float]
    gold_at: int | None
    recall: float | None
    ttft_ms: float
    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    kind: str = ""
    passages: int = 0

    @property
    def example(self) -> str:
        """The example's id, without the place of its gold document."""
        return self.key.rpartition("@")[0] if self.gold_at is not None else self.key


class Records:
    """The answers in one directory. Raises `ConfigError` for other settings than they have."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.path = directory / ANSWERS
        directory.mkdir(parents=True, exist_ok=True)
        _check_settings(directory / SETTINGS, settings)
        _drop_torn_line(self.path)
        self.done = {(r.mode, r.key) for r in read(directory)} if self.path.exists() else set()
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Write one answer; it is there if the process dies afterwards."""
        self._stream.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._stream.flush()
        self.done.add((record.mode, record.key))

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()


def read(directory: Path) -> list[Record]:
    """All answers in a directory. Raises `ConfigError` where there are none."""
    try:
        lines = (directory / ANSWERS).read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} holds no {ANSWERS}; make it with: kvlink-rag eval SET --out {directory}"
        ) from error
    return [_record(line, directory) for line in lines]


def _record(line: str, directory: Path) -> Record:
    try:
        found = json.loads(line)
        for name in ("answers", "tokens", "margins"):
            found[name] = tuple(found[name])
        known = {field.name for field in fields(Record)}  # the last two are newer than the rest
        return Record(**{name: value for name, value in found.items() if name in known})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{directory / ANSWERS} holds a line that is no answer ({error}); delete the line"
        ) from error


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")
        return
    found = json.loads(path.read_text("utf-8"))
    names = sorted(set(found) | set(wanted))
    if other := [name for name in names if found.get(name) != wanted.get(name)]:
        told = "; ".join(f"{n} is {found.get(n)!r}, now {wanted.get(n)!r}" for n in other)
        raise ConfigError(f"{path.parent} holds answers under other settings: {told}; name another")


def _drop_torn_line(path: Path) -> None:
    """Cut what stands behind the last newline."""
    if not path.exists():
        return
    with path.open("r+b") as stream:
        data = stream.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            stream.truncate(whole)
            stream.flush()
            os.fsync(stream.fileno())
