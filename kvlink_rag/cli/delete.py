"""`kvlink-rag delete`: passages out of the collection."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kvlink_rag.errors import ConfigError
from kvlink_rag.quantities import number

from . import terminal
from .opening import OPTIONS, Options, collection


def delete(
    *ids: Annotated[str, Parameter(name="ID")],
    source: tuple[str, ...] = (),
    now: bool = False,
    options: Options = OPTIONS,
) -> int:
    """Delete passages, by id or by their file.

    A passage that another file holds too stays, as that file's.

    Args:
        ids: ids of passages, as shown by ask
        source: all passages of this file, of the files in this folder, or of those that a pattern
            such as 'docs/*.md' means; or of this source, as ask shows it; may be given several
            times
        now: also empty the catalog's log and free pages, and drop snapshots of no passage
    """
    if not ids and not source:
        raise ConfigError("nothing to delete; give ids, or --source with a file's path")
    with collection(options) as rag:
        from kvlink_rag.ingest.index_files import remove

        count, kept = remove(rag, source, ids=ids, now=now)
    stay = f"; {number(kept, 'passage')} of other files too stay" if kept else ""
    terminal.show([f"deleted {number(count, 'passage')}{stay}"])
    return 0
