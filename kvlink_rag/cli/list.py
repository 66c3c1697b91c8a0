"""`kvlink-rag list`: what the collection holds, by source."""

from __future__ import annotations

from collections import Counter

from kvlink_rag.quantities import number

from . import terminal
from .opening import OPTIONS, Options, collection
from .values import Json


def list(*, as_json: Json = False, options: Options = OPTIONS) -> int:
    """The sources of passages, with counts.

    Args:
        as_json: print JSON
    """
    with collection(options) as rag:
        named = (document.metadata.get("source") for document in rag.documents())
        found = Counter(each if isinstance(each, str) else None for each in named)
    sources = sorted(found.items(), key=lambda each: str(each[0] or ""))
    if as_json:
        rows = [{"source": source, "passages": count} for source, count in sources]
        terminal.show_json({"sources": rows, "passages": found.total()})
        return 0
    width = len(f"{max(found.values(), default=0):,}")
    shown = ((count, "(no source)" if source is None else str(source)) for source, count in sources)
    terminal.show(f"{count:{width},}  {' '.join(name.splitlines())}" for count, name in shown)
    from_sources = number(len(sources), "source")
    terminal.show([f"{number(found.total(), 'passage')} from {from_sources}"])
    return 0
