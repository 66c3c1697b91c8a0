"""`kvlink-rag list`: what the collection holds, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvlink_rag.documents import Document
from kvlink_rag.quantities import number

from . import terminal
from .opening import OPTIONS, Options, collection
from .values import Json


def list(*, as_json: Json = False, options: Options = OPTIONS) -> int:
    """The files that passages are from, with counts.

    Of passages that an application added: what it calls their source. A passage that two files
    hold is counted for both, and once in all.

    Args:
        as_json: print JSON
    """
    with collection(options) as rag:
        found: Counter[str | None] = Counter()
        for document in rag.documents():
            found.update(_places(document))
        total = len(rag)
    sources = sorted(found.items(), key=lambda each: each[0] or "")
    if as_json:
        rows = [{"source": source, "passages": count} for source, count in sources]
        terminal.show_json({"sources": rows, "passages": total})
        return 0
    width = len(f"{max(found.values(), default=0):,}")
    shown = ((count, "(no source)" if source is None else source) for source, count in sources)
    terminal.show(f"{count:{width},}  {' '.join(name.splitlines())}" for count, name in shown)
    terminal.show([f"{number(total, 'passage')} from {number(len(sources), 'source')}"])
    return 0


def _places(document: Document) -> Iterable[str | None]:
    """Its files, else its source."""
    from kvlink_rag.ingest.sources import files_of, shown

    source = document.metadata.get("source")
    return [*map(shown, files_of(document))] or [source if isinstance(source, str) else None]
