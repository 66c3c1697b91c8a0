"""Rows of a data set as dictionaries: local JSONL, JSON and parquet files, or a name on the hub.

Knows files and the `datasets` library; knows no schema. A line that is no JSON object is handed on
as an `ExampleError`, so that who reads decides whether to skip or stop.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlink_rag.errors import ConfigError, ExampleError, MissingExtra

Row = Mapping[str, Any]

PARQUET = "refs/convert/parquet"
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from.

    path: a file, a folder of files, or a hub id. config, split: of a hub data set.
    """

    path: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return ":".join(part for part in (self.path, self.config) if part)


def rows(source: Source) -> Iterator[Row | ExampleError]:
    """All rows in order, or an error in a row's place; nothing is read before the first `next()`.

    Raises `ConfigError` (no such file or data set) and `MissingExtra`.
    """
    path = Path(source.path).expanduser()
    files = _files(path)
    if files is None:
        yield from _hub(source)
        return
    for file in files:
        yield from _parquet(file) if file.suffix == ".parquet" else _json(file)


def shuffled(items: Iterable[Any], rng: random.Random, size: int) -> Iterator[Any]:
    """`items` through a buffer of `size` from which each next one is drawn at random."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        at = rng.randrange(size)
        yield buffer[at]
        buffer[at] = item
    rng.shuffle(buffer)
    yield from buffer


def _files(path: Path) -> list[Path] | None:
    """The files that `path` means, or None where it is a name on the hub."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(f"{path} is no data set file; expected one of {', '.join(SUFFIXES)}")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not found:
            raise ConfigError(f"{path} holds no data set file ({', '.join(SUFFIXES)})")
        return found
    if path.is_absolute() or path.name.endswith(SUFFIXES) or str(path).count("/") > 1:
        raise ConfigError(f"no data set at {path}; give a file, a folder or a hub id owner/name")
    return None


def _json(file: Path) -> Iterator[Row | ExampleError]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as stream:
        if ".jsonl" in file.suffixes:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _object(line, f"{file.name}, line {number}")
            return
        try:
            found = json.load(stream)
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, list):
        raise ConfigError(f"{file}: found {type(found).__name__}, expected a list of objects")
    yield from (
        row if isinstance(row, dict) else ExampleError(f"{file.name}, row {i}: not an object")
        for i, row in enumerate(found)
    )


def _object(line: str, place: str) -> Row | ExampleError:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ExampleError(f"{place}: not JSON ({error})")
    return found if isinstance(found, dict) else ExampleError(f"{place}: not an object")


def _parquet(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra.of("pyarrow", "eval", f"reading {file.name}") from error
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _hub(source: Source) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra.of("datasets", "eval", f"the data set {source}") from error
    try:
        yield from _streamed(datasets.load_dataset, source)
    except (OSError, ValueError, RuntimeError) as error:  # what the hub and the library raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the data set {source} is neither a file here nor to be had from the hub "
            f"({type(error).__name__}: {reason}); give a file with its rows"
        ) from error


def _streamed(load: Callable[..., Any], source: Source) -> Iterable[Row]:
    """A stream from the hub; of a set that is a script, the hub's own conversion to parquet."""
    arguments = {"split": source.split, "streaming": True}
    try:
        found: Iterable[Row] = load(source.path, source.config, **arguments)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        found = load(source.path, source.config, revision=PARQUET, **arguments)
    return found
