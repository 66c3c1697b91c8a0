"""Which file a passage is from: one identity for a file, whatever way its path is written.

Passages of files name their files under `FILE_KEY` in their metadata, by resolved paths; `source`
is only what is shown, and an application's or a JSON line's own one says nothing. Passages made
before there was such a key are known by what the readers of that time wrote. Knows no file's text.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from kvlink_rag.collection.rag import KVLinkRAG
from kvlink_rag.documents import Document

FILE_KEY = "kvlink_files"
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")
_ID_OF_CONTENT = re.compile(r"[0-9a-f]{32}")
_OLD_KEYS = {"source", "format", "page"}  # all that readers wrote before there was `FILE_KEY`
_LINES = (".jsonl",)  # whose documents had any keys


@dataclass(frozen=True, slots=True)
class Known:
    """A passage that a collection holds: its files, a digest of its text, and the source shown."""

    files: frozenset[str]
    digest: bytes
    source: str


def identity(path: str | PathLike[str]) -> str:
    """The file's or folder's own path: absolute, without links. Bytes that are no text escaped."""
    return os.fsencode(os.path.realpath(path)).decode("utf-8", errors="backslashreplace")


def shown(file: str) -> str:
    """An identity as people read it: relative to the current folder where it is inside."""
    here = os.path.join(os.path.realpath(os.curdir), "")
    return file[len(here) :] if file.startswith(here) else file


def exists(file: str) -> bool:
    """Whether the file is there; taken for granted where its name is no text."""
    return _ESCAPED.search(file) is not None or os.path.exists(file)


def is_below(file: str, folders: Iterable[str]) -> bool:
    """Whether `file` is one of `folders` (identities), or stands in one."""
    return any(file == folder or file.startswith(os.path.join(folder, "")) for folder in folders)


def digest(document: Document) -> bytes:
    """The same for equal titles and texts."""
    content = f"{document.title}\n{document.text}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()


def known_passages(rag: KVLinkRAG) -> dict[str, Known]:
    """All passages of `rag` by id."""
    return {
        str(document.id): Known(
            frozenset(files_of(document)),
            digest(document),
            str(document.metadata.get("source", "")),
        )
        for document in rag.documents()
    }


def files_of(document: Document) -> list[str]:
    """The files that hold a passage; none for an application's own."""
    files = document.metadata.get(FILE_KEY)
    if isinstance(files, list):
        return [file for file in files if isinstance(file, str)]
    source = document.metadata.get("source")
    if isinstance(source, str) and _is_of_old(document, source):
        return [identity(source)]
    return []


def _is_of_old(document: Document, source: str) -> bool:
    """Whether `index` made this passage before it wrote `FILE_KEY`."""
    suffix = Path(source).suffix.lower()
    if suffix in _LINES:
        return True
    if not _OLD_KEYS.issuperset(document.metadata) or not _ID_OF_CONTENT.fullmatch(
        document.id or ""
    ):
        return False
    if suffix == ".pdf":
        return "page" in document.metadata
    return "format" in document.metadata or (suffix == ".txt" and document.title == _stem(source))


def _stem(source: str) -> str:
    return Path(source).stem


def matching(rag: KVLinkRAG, wanted: str) -> dict[str, frozenset[str]]:
    """Passages of a file, of all files in a folder, or of those that a pattern takes.

    For each id, the files that hold it and are not meant. Where no file is meant, the passages
    whose `source` is `wanted`. A name that is there is no pattern.
    """
    path, pattern = identity(wanted), _pattern(wanted)
    found: list[dict[str, frozenset[str]]] = [{}, {}, {}]
    for document in rag.documents():
        id, files = str(document.id), files_of(document)
        source = document.metadata.get("source")
        inside = {file for file in files if is_below(file, [path])}
        alike = {file for file in files if pattern(file)}
        if inside:
            found[0][id] = frozenset(files) - inside
        elif alike:
            found[1][id] = frozenset(files) - alike
        elif isinstance(source, str) and (source == wanted or pattern(source)):
            found[2][id] = frozenset()
    return next(filter(None, found), {})


def _pattern(wanted: str) -> Callable[[str], bool]:
    """Whether a path or source is one that a pattern of the shell takes, wherever we stand."""
    if not any(sign in wanted for sign in "*?["):
        return lambda text: False
    absolute = os.path.join(os.path.realpath(os.curdir), wanted)
    matches = [re.compile(fnmatch.translate(each)).match for each in (wanted, absolute)]
    return lambda text: any(match(text) is not None for match in matches)


def gone_files(files: Iterable[str], folders: Iterable[str]) -> Iterator[str]:
    """Those of `files` in `folders` (identities of both) that are no more."""
    within = list(folders)
    return (file for file in sorted(set(files)) if is_below(file, within) and not exists(file))
