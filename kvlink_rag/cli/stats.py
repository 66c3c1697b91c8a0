"""`kvlink-rag stats`: what the collection holds, in numbers."""

from __future__ import annotations

from kvlink_rag.quantities import size

from . import terminal
from .opening import OPTIONS, Options, collection
from .values import Json

# What is shown; the JSON also has counters, which begin anew with each command.
_SHOWN = (
    "directory",
    "model",
    "embedder",
    "codec",
    "storage_dtype",
    "documents",
    "embedded",
    "tokens",
    "snapshots",
    "snapshot_bytes",
    "bytes_per_token",
    "budget",
)


def stats(*, as_json: Json = False, options: Options = OPTIONS) -> int:
    """What the collection holds, in numbers.

    Args:
        as_json: print JSON
    """
    with collection(options) as rag:
        fields = {"directory": str(rag.directory), **rag.stats().to_dict()}
    if as_json:
        terminal.show_json(fields)
        return 0
    fields["snapshot_bytes"] = size(fields["snapshot_bytes"])
    terminal.show(f"{name.replace('_', ' '):15}  {_plain(fields[name])}" for name in _SHOWN)
    return 0


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
