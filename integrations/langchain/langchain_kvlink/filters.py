"""LangChain's filters as the engine's: which passages may be hits.

Knows passages and documents; knows no search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_core.documents import Document

from kvlink_rag.errors import ConfigError
from langchain_kvlink.documents import from_passage, is_fresh

if TYPE_CHECKING:
    from kvlink_rag.documents import Document as Passage

    Where: TypeAlias = Callable[[Passage], bool]

Filter = Mapping[str, Any] | Callable[[Document], bool]
_SUPPORTED = (
    "supported are equality with a value, as {'key': value}, one of several values, as "
    "{'key': [value, value]}, several keys at once (all must hold), and for all else a function, "
    "as lambda document: document.metadata['n'] > 3"
)


def as_where(filter: Filter | None) -> Where | None:
    """A LangChain filter as the engine's: of a passage.

    A mapping asks that metadata have these values; a list of values asks for one of them (or for
    that very list); a function takes a document. Raises `ConfigError` (a `ValueError`) for
    anything else, such as operators.
    """
    if filter is None:
        return None
    if isinstance(filter, Mapping):
        wanted = dict(filter)
        _check_wanted(wanted)
        return lambda passage: all(
            key in passage.metadata and _is_wanted(passage.metadata[key], value)
            for key, value in wanted.items()
        )
    if callable(filter):
        accepts = filter
        return lambda passage: bool(accepts(from_passage(passage)))
    raise ConfigError(
        f"filter is a {type(filter).__name__}, expected a mapping of metadata or a function of a "
        "Document"
    )


def once(where: Where | None) -> Where:
    """`where`, and of passages that differ only in an id made for one run the first that comes.

    A program that gives new random ids each time it runs adds its documents again each time. By
    LangChain's rules each id stays, for `get_by_ids` and `delete`; one search finds one of them.
    """
    first: dict[str, str | None] = {}

    def accepts(passage: Passage) -> bool:
        if where is not None and not where(passage):
            return False
        return (
            not is_fresh(passage.id)
            or first.setdefault(passage.canonical(), passage.id) == passage.id
        )

    return accepts


def _is_wanted(found: Any, wanted: Any) -> bool:
    return bool(found == wanted) or (isinstance(wanted, list) and found in wanted)


def _check_wanted(wanted: Mapping[Any, Any]) -> None:
    """Raise `ConfigError` for what no metadata can equal: operators, other keys, tuples, sets."""
    for key, value in wanted.items():
        names = [key, *(value if isinstance(value, Mapping) else ())]
        if operators := [name for name in names if str(name).startswith("$")]:
            raise ConfigError(f"the filter has the operator {operators[0]!r}; {_SUPPORTED}")
        if not isinstance(key, str):
            raise ConfigError(f"the filter has the key {key!r}, expected a string; {_SUPPORTED}")
        if isinstance(value, tuple | set | frozenset):
            raise ConfigError(
                f"the filter asks {key!r} for a {type(value).__name__}, which no metadata holds; "
                f"{_SUPPORTED}"
            )
