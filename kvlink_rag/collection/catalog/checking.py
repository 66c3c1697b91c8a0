"""What `check` looks at in a catalog: SQLite's pages, every document, every embedding.

Knows what each must be; knows neither the index nor the snapshots that follow from them.
"""

from __future__ import annotations

from kvlink_rag.errors import CatalogError

from .connection import Database
from .reading import every_row
from .records import entry, is_sound
from .writing import drop_embeddings, reindex


def check(database: Database, fix: bool) -> list[str]:
    """What is wrong, one line each; `fix` mends what can be made again."""
    problems = _check_pages(database, fix)
    try:
        return problems + _check_documents(database) + _check_embeddings(database, fix)
    except CatalogError as error:
        return [*problems, str(error)]


def _check_pages(database: Database, fix: bool) -> list[str]:
    found = [str(line) for (line,) in database.all("PRAGMA integrity_check")]
    if found != ["ok"] and fix:
        reindex(database)
    return [] if found == ["ok"] else [f"damaged database: {line}" for line in found]


def _check_documents(database: Database) -> list[str]:
    problems = []
    for row in every_row(database):
        try:
            entry(row)
        except CatalogError as error:
            problems.append(str(error))
    return problems


def _check_embeddings(database: Database, fix: bool) -> list[str]:
    rows = every_row(database, "row, embedding")
    bad = [row for row, blob in rows if not is_sound(blob)]
    if bad and fix:
        drop_embeddings(database, bad)
    return [f"damaged embedding: row {row}" for row in bad]
