"""Finding files, and their bytes as text. Knows the file system; knows no format."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from kvlink_rag.arguments import check_encoding

if TYPE_CHECKING:
    from .encodings import Decoded

MAX_BYTES = 64 * 2**20
_SUFFIXES_SHOWN = 10
_KINDS_SHOWN = 8
_NAMES_SHOWN = 5

_SURROGATE = re.compile("[\ud800-\udfff]")


_NAMES_OF_TEXTS = frozenset(
    [
        "readme",
        "license",
        "licence",
        "copying",
        "notice",
        "authors",
        "contributors",
        "changelog",
        "changes",
        "history",
        "news",
        "todo",
        "install",
        "makefile",
        "dockerfile",
    ]
)


def suffix_of(name: str) -> str:
    """The suffix that says a file's format; .txt for names such as README."""
    if name.lower() in _NAMES_OF_TEXTS:
        return ".txt"
    return os.path.splitext(name)[1].lower()


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong in one place: `source` is a path, `path:line` or `path, page n`.

    skipped: the place gave no document. Otherwise it did, but some of it is not as it was.
    """

    source: str
    message: str
    skipped: bool = True

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    max_bytes: the most bytes of one file, or of one line of JSON lines. encoding: of all text, in
    place of what the files say or look like. text_key: where JSON lines have their text.
    """

    max_bytes: int = MAX_BYTES
    encoding: str | None = None
    text_key: str = "text"

    def __post_init__(self) -> None:
        if self.encoding is not None:
            check_encoding(self.encoding)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, and the name it goes by."""

    path: Path
    source: str

    @property
    def suffix(self) -> str:
        """The lower-case suffix, which says the format."""
        return suffix_of(self.path.name)

    @property
    def stem(self) -> str:
        """The file's name without suffix: the last resort for a title."""
        return clean(self.path.stem)

    def size(self) -> int:
        """Bytes of the file; 0 where it cannot be looked at."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def load(self, max_bytes: int) -> bytes | Problem:
        """The whole file, or the problem that it is too large."""
        with self.path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
        return data if len(data) <= max_bytes else too_large(self.source, "the file", max_bytes)


def too_large(source: str, what: str, max_bytes: int) -> Problem:
    """The problem of a file or line over the limit."""
    limit = f"{max_bytes / 2**20:g} MiB" if max_bytes >= 2**20 else f"{max_bytes} bytes"
    return Problem(source, f"{what} is larger than {limit}; split it, or raise the limit")


def reason(error: BaseException) -> str:
    """An error's kind and words, in one short line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def clean(text: str) -> str:
    """`text` with lone surrogates, which are no Unicode text, as U+FFFD."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def warned(found: Decoded, source: str) -> Iterator[Problem]:
    """What is to be said about text that was decoded."""
    if found.binary:
        yield not_text(source)
    elif found.warning:
        yield Problem(source, found.warning, skipped=False)


def not_text(source: str) -> Problem:
    """The problem of a file that `is_binary`."""
    return Problem(source, "not a text file: it holds zero bytes (name its encoding if it is one)")


def find_files(
    paths: Iterable[str | PathLike[str]], suffixes: Collection[str]
) -> tuple[list[SourceFile], list[Problem]]:
    """The files of `paths` with one of `suffixes`, each once, and the paths that gave none."""
    search = _Search(suffixes)
    for path in paths:
        if os.fspath(path) == "":  # Path would read the folder we are in
            search.problems.append(Problem("''", "no such file or folder"))
        else:
            search.take(Path(path))
    return search.files, search.problems


class _Search:
    """One walk over some paths. No recursion: folders may be nested deeper than Python's stack."""

    def __init__(self, suffixes: Collection[str]) -> None:
        self.files: list[SourceFile] = []
        self.problems: list[Problem] = []
        self._suffixes = suffixes
        self._known = ", ".join(list(suffixes)[:_SUFFIXES_SHOWN]) + " and programs"
        self._seen: dict[tuple[int, int], str] = {}  # device and inode: links may lead back
        self._above: dict[tuple[int, int], str] = {}  # the folders that hold the one taken now
        self._others: list[Path] = []  # files of unknown kinds in the folder taken now

    def take(self, path: Path) -> None:
        """All files at or below a path that the caller named."""
        source = clean(path.as_posix())
        self._above = _parents(path)
        kind = self._kind(path, source)
        if kind == "folder":
            self._others = []
            if not self._walk(path):
                self._problem(source, f"no {self._known} files in this folder")
            self._tell_others(source)
        elif kind == "file" and suffix_of(path.name) in self._suffixes:
            self.files.append(SourceFile(path, source))
        elif kind in ("file", "other"):
            self._problem(source, f"not a file of a known kind; known are {self._known}")

    def _walk(self, folder: Path) -> bool:
        """Take the files below `folder`; whether there is any, taken before or not."""
        pending, some = self._children(folder), False
        while pending:
            path = pending.pop()
            kind = "" if self._leads_back(path) else self._kind(path, clean(path.as_posix()))
            if kind == "folder":
                pending += self._children(path)
            elif kind == "file":
                self.files.append(SourceFile(path, clean(path.as_posix())))
            some = some or kind != "folder"
        return some

    def _tell_others(self, source: str) -> None:
        """Files that are passed over are counted and, some of them, named."""
        others = sorted(clean(path.as_posix()) for path in self._others)
        if not others:
            return
        counts = Counter(suffix_of(path.name) or "without suffix" for path in self._others)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(_KINDS_SHOWN))
        shown = ", ".join(others[:_NAMES_SHOWN]) + (", …" if len(others) > _NAMES_SHOWN else "")
        files = "1 file" if len(others) == 1 else f"{len(others)} files"
        message = f"{files} of unknown kinds passed over ({kinds}): {shown}"
        self.problems.append(Problem(source, message, skipped=False))

    def _leads_back(self, path: Path) -> bool:
        """Whether `path` is a folder read already under another name, or one above; told then."""
        if not os.path.isdir(path):  # False too for a path that cannot be looked at
            return False
        identity, source = _identity(path.stat()), clean(path.as_posix())
        there, above = self._seen.get(identity), self._above.get(identity)
        if there not in (None, source):
            message = f"the same folder as {there}; read there, skipped here"
        elif above is not None:
            message = f"a link to {above}, a folder above it; not followed"
        else:
            return False
        self.problems.append(Problem(source, message, skipped=False))
        return True

    def _children(self, folder: Path) -> list[Path]:
        """Folders and files of known kinds in `folder`, not hidden, the first by name last."""
        try:
            with os.scandir(folder) as entries:
                names = sorted((e.name for e in entries if self._wanted(e)), reverse=True)
        except OSError as error:
            self._problem(clean(folder.as_posix()), f"cannot be listed: {error.strerror}")
            return []
        return [folder / name for name in names]

    def _wanted(self, entry: os.DirEntry[str]) -> bool:
        if entry.name.startswith("."):
            return False
        with contextlib.suppress(OSError):  # a link to itself
            if suffix_of(entry.name) in self._suffixes or entry.is_dir():
                return True
            if entry.is_file():
                self._others.append(Path(entry.path))
        return False

    def _kind(self, path: Path, source: str) -> str:
        """ "file", "folder" or "other"; "" for what was seen before or cannot be looked at."""
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            reason = "no such file or folder" if isinstance(error, FileNotFoundError) else error
            self._problem(source, str(getattr(reason, "strerror", None) or reason))
            return ""
        identity = _identity(status)
        if identity in self._seen:
            return ""
        if stat.S_ISDIR(status.st_mode) or suffix_of(path.name) in self._suffixes:
            self._seen[identity] = source
        if stat.S_ISDIR(status.st_mode):
            return "folder"
        return "file" if stat.S_ISREG(status.st_mode) else "other"

    def _problem(self, source: str, message: str) -> None:
        self.problems.append(Problem(source, message))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _parents(path: Path) -> dict[tuple[int, int], str]:
    """The folders above `path`, by device and inode."""
    found = {}
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        for parent in path.resolve().parents:
            found[_identity(parent.stat())] = clean(parent.as_posix())
    return found
