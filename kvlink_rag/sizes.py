"""Counts and sizes in arguments: one rule for the API and the command line."""

from __future__ import annotations

import re
from numbers import Integral

from .errors import ConfigError

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?))?b?", re.ASCII | re.IGNORECASE)


def is_count(value: object, least: int = 1) -> bool:
    """Whether `value` is a whole number (NumPy's too, no bool) of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def parse_size(size: int | str, name: str = "size", *, least: int = 0) -> int:
    """Bytes of `size`: how many, or text such as 500kB, "1.5 GB" (10^9 each) or 512MiB (2^20 each).

    name: of the argument, for the error. Raises `ConfigError` for anything else, and for less than
    `least` bytes.
    """
    count = int(size) if is_count(size, least) else -1
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        number, letter, binary = match.groups()
        thousands = "kmgt".index(letter.lower()) + 1 if letter else 0
        count = int(float(number) * (1024 if binary else 1000) ** thousands)
    if count < least:
        raise ConfigError(
            f"{name} is {size!r}, expected at least {least} bytes: a whole number, or text such as "
            "500MB, 20GB or 512MiB"
        )
    return count
