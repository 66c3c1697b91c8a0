"""Files that appear whole or not at all.

A temporary file is locked (`flock`) while its writer lives, so whoever finds one unlocked knows
that its writer died and may remove it: no clock, no process id. Knows nothing of what is written.
POSIX only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from .forks import undivided

_SUFFIX = ".tmp"
_ROOM = 256 * 1024  # shared memory takes 32 KiB, the first pages of a log a few more


@contextlib.contextmanager
def temporary(directory: Path, name: str) -> Iterator[FileIO]:
    """A new, locked file `directory/name.<random>.tmp`, mode 0600, removed at the end.

    Unbuffered. To keep what was written, link or rename `file.name` before the block ends.
    """
    file = _create_locked(directory, name)
    try:
        with file:
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)


@contextlib.contextmanager
def replaced(path: Path, *, sync: bool = False) -> Iterator[FileIO]:
    """A file that takes the place of `path` when the block ends without an error.

    With `sync` the bytes and the name are on the disk when this returns; without, a power cut
    may leave the new file damaged (never a crash of the process alone), so it needs a checksum.
    Leftovers of dead writers of the same path are removed.
    """
    for leftover in abandoned(path.parent, path.name):
        leftover.unlink(missing_ok=True)
    with temporary(path.parent, path.name) as file:
        yield file
        if sync:
            os.fsync(file.fileno())
        os.replace(file.name, path)
    if sync:
        sync_directory(path.parent)


def abandoned(directory: Path, name: str | None = None) -> Iterator[Path]:
    """The temporary files in `directory` (those for `name`, or all) whose writer is dead.

    Each is held locked until the next is asked for: nobody else takes it for abandoned meanwhile.
    """
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        if name in (None, temporary_for(path)):
            with _held(path) as held:
                if held:
                    yield path


def temporary_for(path: Path) -> str | None:
    """The name a temporary file was made for; None where `path` is not a temporary file."""
    stem = path.name.removesuffix(_SUFFIX)
    name, _, token = stem.rpartition(".")
    return name if stem != path.name and name and len(token) == 16 else None


def is_read_only(directory: Path) -> bool:
    """Whether `directory` lies on a file system that nobody can write to for now."""
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def is_full(directory: Path) -> bool:
    """Whether the file system of `directory` has no room for what SQLite needs to read a log."""
    return free_bytes(directory) < _ROOM


def free_bytes(directory: Path) -> int:
    """What a user may still write to the file system of `directory`."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def link(source: Path, target: Path) -> None:
    """A second name for a file; on file systems without links, its only one.

    Raises `FileExistsError` where `target` is there.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        os.rename(source, target)


def sync_directory(directory: Path) -> None:
    """Put the names in `directory` on the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(file: FileIO, data: memoryview) -> None:
    """Write the whole of `data` to an unbuffered file, which may take it in pieces."""
    data = data.cast("B")
    while data:
        data = data[file.write(data) :]


def private_directory(path: Path) -> Path:
    """Make the directory `path`, mode 0700, or narrow the one that is there.

    On a read-only file system its mode stays: nobody can narrow it there.
    Raises `NotADirectoryError` where `path` is a symbolic link or a file.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink():
        raise NotADirectoryError(f"{path} is a symbolic link, expected a directory")
    if path.stat().st_mode & 0o077 and not is_read_only(path):
        path.chmod(0o700)
    return path


def _create_locked(directory: Path, name: str) -> FileIO:
    with _locked(directory, fcntl.LOCK_SH):  # nobody sees the file before it is locked
        path = os.fspath(directory / f"{name}.{secrets.token_hex(8)}{_SUFFIX}")
        file = FileIO(path, "x+", opener=_private)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            raise
        return file


@contextlib.contextmanager
def _locked(directory: Path, operation: int) -> Iterator[None]:
    """Hold the lock of a directory; do without on file systems that cannot lock one.

    A child forked meanwhile would hold it too, for as long as it lives.
    """
    with undivided():
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, operation)
            yield
        finally:
            os.close(fd)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Lock `path` if no living process holds it; whether that was so. Never a directory."""
    with contextlib.ExitStack() as stack:
        with _locked(path.parent, fcntl.LOCK_EX):
            held = path.is_symlink() or _try_lock(path, stack)
        yield held


def _try_lock(path: Path, stack: contextlib.ExitStack) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return not stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError:
        return False
