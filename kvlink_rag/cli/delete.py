"""`kvlink-rag delete`: passages out of the collection."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
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
            such as 'docs/*.md' means, as shown by list; may be given several times
    """
    if not ids and not source:
        raise ConfigError("nothing to delete; give ids, or --source with a file's path")
    with collection(options) as rag:
        from kvlink_rag.ingest.index_files import ids_from

        named = (document.metadata.get("source") for document in rag.documents())
        known = {each for each in named if isinstance(each, str) and each}
        sources: set[str] = set()
        for given in source:
            if not (found := meant(given, known)):
                raise DocumentNotFound(f"no passage of {given!r} in {rag.directory}")
            sources |= found
        count = rag.delete(sorted({*ids, *ids_from(rag, sources)}))
    several = f" of {number(len(sources), 'file')}" if len(sources) > 1 else ""
    terminal.show([f"deleted {number(count, 'passage')}{several}"])
    return 0


def meant(given: str, sources: Iterable[str]) -> set[str]:
    """Which of `sources` is `given`, lies below it, or else fits it as a pattern."""
    path = Path(given)
    below = {each for each in sources if path in (PurePath(each), *PurePath(each).parents)}
    return below or {each for each in sources if fnmatchcase(each, path.as_posix())}
