"""LlamaIndex's metadata filters as the engine's: which passages may be hits.

The rules are those of LlamaIndex's own in-memory store (`build_metadata_filter_fn`), and filters
may be nested. Knows passages and nodes' metadata; knows no search.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from llama_index.llms.kvlink.nodes import metadata_of

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError

_HOLDS: dict[FilterOperator, Callable[[Any, Any], bool]] = {
    FilterOperator.EQ: operator.eq,
    FilterOperator.NE: operator.ne,
    FilterOperator.GT: operator.gt,
    FilterOperator.GTE: operator.ge,
    FilterOperator.LT: operator.lt,
    FilterOperator.LTE: operator.le,
    FilterOperator.IN: lambda found, wanted: found in wanted,
    FilterOperator.NIN: lambda found, wanted: found not in wanted,
    FilterOperator.CONTAINS: lambda found, wanted: wanted in found,
    FilterOperator.ANY: lambda found, wanted: any(value in found for value in wanted),
    FilterOperator.ALL: lambda found, wanted: all(value in found for value in wanted),
    FilterOperator.TEXT_MATCH: lambda found, wanted: _text(wanted) in _text(found),
    FilterOperator.TEXT_MATCH_INSENSITIVE: (
        lambda found, wanted: _text(wanted).casefold() in _text(found).casefold()
    ),
}
_OF_NOTHING = (FilterOperator.NE, FilterOperator.NIN)  # hold where there is no such metadata


def as_where(filters: MetadataFilters | None) -> Callable[[Document], bool] | None:
    """LlamaIndex's filters as the engine's: of a document. Raises `ConfigError` for other types."""
    if filters is None:
        return None
    if not isinstance(filters, MetadataFilters):
        raise ConfigError(
            f"filters is a {type(filters).__name__}, expected MetadataFilters, such as "
            "MetadataFilters(filters=[MetadataFilter(key='lang', value='en')])"
        )
    return lambda document: _meets(metadata_of(document), filters)


def _meets(metadata: Mapping[str, Any], filters: MetadataFilters) -> bool:
    if not filters.filters:
        return True
    met = (
        _meets(metadata, one) if isinstance(one, MetadataFilters) else _holds(metadata, one)
        for one in filters.filters
    )
    if filters.condition == FilterCondition.OR:
        return any(met)
    if filters.condition == FilterCondition.NOT:
        return not any(met)
    return all(met)


def _holds(metadata: Mapping[str, Any], wanted: MetadataFilter) -> bool:
    found = metadata.get(wanted.key)
    if wanted.operator == FilterOperator.IS_EMPTY:
        return found is None or found in ("", [])
    if found is None:
        return wanted.operator in _OF_NOTHING
    try:
        return bool(_HOLDS[wanted.operator](found, wanted.value))
    except TypeError as error:
        raise ConfigError(
            f"the filter asks whether {wanted.key!r} {wanted.operator.value} {wanted.value!r}, but "
            f"a node has {found!r:.80} there ({error})"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text is matched with text")
    return value
