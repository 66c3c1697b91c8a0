"""Which paths SQLite and the libraries beside it can open. Knows no table."""

from __future__ import annotations

import os
from pathlib import Path

_LONG = 480  # bytes; SQLite takes 504, and a new catalog's temporary name has 21 more


def require_text(path: Path) -> None:
    """Raise `OSError` where the bytes of `path` are not UTF-8: files below it cannot be mapped."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise OSError("its path is not UTF-8; move or rename the directory") from None


def printable(path: Path) -> str:
    """`path` with its undecodable bytes spelled out, so that it can be logged and printed."""
    return os.fsencode(path).decode(errors="backslashreplace")


def cause(path: Path, error: Exception) -> str:
    """What `error` says of the database at `path`, and that its path is too long where it is.

    SQLite's own message for that is "unable to open database file".
    """
    length = len(os.fsencode(path))
    if length < _LONG or "unable to open" not in str(error):
        return str(error)
    return f"{error}: its path of {length} bytes is too long for SQLite; use one below {_LONG}"
