"""`kvlink-rag delete`: passages out of the collection."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kvlink_rag.errors import ConfigError, DocumentNotFound
from kvlink_rag.quantities import number

from . import terminal
from .opening import OPTIONS, Options, collection


def delete(
    *ids: Annotated[str, Parameter(name="ID")],
    source: tuple[str, ...] = (),
    options: Options = OPTIONS,
) -> int:
    """Delete passages, by id or by their file.

    Args:
        ids: ids of passages, as shown by ask
        source: all passages of this file, of the files in this folder, or of those that a pattern
            such as 'docs/*.md' means; or of this source, as ask shows it; may be given several
            times
    """
    if not ids and not source:
        raise ConfigError("nothing to delete; give ids, or --source with a file's path")
    with collection(options) as rag:
        from kvlink_rag.ingest.index_files import ids_from

        wanted = set(ids)
        for given in source:
            if not (found := ids_from(rag, [given])):
                raise DocumentNotFound(f"no passage of {given!r} in {rag.directory}")
            wanted |= found
        count = rag.delete(sorted(wanted))
    terminal.show([f"deleted {number(count, 'passage')}"])
    return 0
