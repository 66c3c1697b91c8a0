"""Numbers for people: bytes, counts. Knows no terminal."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.3g} TB"


def number(count: float, one: str, many: str = "") -> str:
    """ "1 passage", "2,000 passages"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
