"""Finding files, and their bytes as text. Knows the file system; knows no format."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

MAX_BYTES = 64 * 2**20

_SURROGATE = re.compile("[\ud800-\udfff]")
_BINARY_LOOK = 8192  # a NUL this early means that a file is not text, as for git
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


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
class SourceFile:
    """A file to read, and the name it goes by."""

    path: Path
    source: str

    @property
    def suffix(self) -> str:
        """The lower-case suffix, which says the format."""
        return self.path.suffix.lower()

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


def clean(text: str) -> str:
    """`text` with lone surrogates, which are no Unicode text, as U+FFFD."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def decode(data: bytes, source: str) -> tuple[str, list[Problem]]:
    """Text of `data`: by its byte order mark, else UTF-8; lines end with a newline alone.

    What cannot be decoded becomes U+FFFD, with a warning. Binary data is a problem without text.
    """
    encoding = marked_encoding(data) or "utf-8"
    problems = []
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        text = data.decode(encoding, errors="replace")
        name = encoding.removesuffix("-sig").upper()
        message = f"not {name} at byte {error.start}; what cannot be read was replaced by U+FFFD"
        problems.append(Problem(source, message, skipped=False))
    if is_binary(text):
        return "", [not_text(source)]
    return text.replace("\r\n", "\n").replace("\r", "\n"), problems


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def is_binary(text: str) -> bool:
    """Does decoded `text` look like no text at all?"""
    return "\0" in text[:_BINARY_LOOK]


def not_text(source: str) -> Problem:
    """The problem of a file that `is_binary`."""
    return Problem(source, "not a text file: it holds zero bytes (UTF-16 needs a byte order mark)")


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
        self._known = ", ".join(suffixes)
        self._seen: dict[tuple[int, int], str] = {}  # device and inode: links may lead back
        self._above: dict[tuple[int, int], str] = {}  # the folders that hold the one taken now

    def take(self, path: Path) -> None:
        """All files at or below a path that the caller named."""
        source = clean(path.as_posix())
        self._above = _parents(path)
        kind = self._kind(path, source)
        if kind == "folder":
            if not self._walk(path):
                self._problem(source, f"no {self._known} files in this folder")
        elif kind == "file" and path.suffix.lower() in self._suffixes:
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
        known = os.path.splitext(entry.name)[1].lower() in self._suffixes
        with contextlib.suppress(OSError):  # a link to itself
            return not entry.name.startswith(".") and (known or entry.is_dir())
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
        if stat.S_ISDIR(status.st_mode) or path.suffix.lower() in self._suffixes:
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
