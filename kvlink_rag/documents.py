"""Plain data that everything shares: documents, hits and the parts of a prompt.

Knows nothing of tokens, tensors or files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .errors import DocumentError, PromptError

MAX_DEPTH = 100  # mappings and lists inside each other, the outermost counted
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Document:
    """One passage of text: the unit of retrieval and of encoding.

    `metadata` must be JSON (string keys; strings, finite numbers, booleans, None, lists and
    mappings, at most `MAX_DEPTH` deep), so that it comes back as it was; `canonical` raises where
    it is not, and adding where it is deeper. A document
    without an `id` gets one derived from title, text and metadata when it is added (`identified`).
    Raises `DocumentError` where a field has another type.
    """

    text: str
    title: str = ""
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("title", self.title)):
            if not isinstance(value, str):
                raise DocumentError(f"a document's {name} is {type(value).__name__}, expected str")
        if self.id is not None and (not isinstance(self.id, str) or not self.id):
            raise DocumentError(f"a document's id is {self.id!r}, expected a non-empty str or None")
        if not isinstance(self.metadata, Mapping):
            found = type(self.metadata).__name__
            raise DocumentError(f"a document's metadata is {found}, expected a mapping")

    def __hash__(self) -> int:
        return hash((self.text, self.title, self.id))

    def canonical(self) -> str:
        """Title, text and metadata as one JSON string, the same for equal content.

        Raises `DocumentError` for metadata that is not JSON or that JSON would change.
        """
        name = self.id or self.title or self.text[:40]
        try:
            _check_unchanged(self.metadata)
            return json.dumps(
                [self.title, self.text, dict(self.metadata)],
                sort_keys=True,
                ensure_ascii=True,
                allow_nan=False,
                separators=(",", ":"),
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise DocumentError(
                f"the metadata of document {name!r} is not JSON ({error}); use strings as keys, "
                "and as values strings, finite numbers, booleans, None, lists and mappings"
            ) from error

    def identified(self) -> Document:
        """This document, with an id derived from its content where it had none."""
        if self.id is not None:
            return self
        return replace(self, id=hashlib.sha256(self.canonical().encode()).hexdigest()[:32])


def odd_keys(metadata: Mapping[Any, Any]) -> list[Any]:
    """The keys whose value, or which themselves, JSON does not take or would change."""
    return [key for key, value in metadata.items() if not _is_json({key: value})]


def as_json(metadata: Mapping[Any, Any]) -> dict[str, Any]:
    """`metadata`, with what is not JSON as `jsonable` has it. Raises `DocumentError` likewise."""
    odd = odd_keys(bounded(metadata))
    return {str(k): _jsonable(value) if k in odd else value for k, value in metadata.items()}


def jsonable(value: Any) -> Any:
    """`value` as JSON takes it: other objects, keys and numbers that are not finite as text.

    Raises `DocumentError` where it is more than `MAX_DEPTH` deep.
    """
    return _jsonable(bounded(value))


def bounded(value: Value, what: str = "metadata") -> Value:
    """`value`. Raises `DocumentError` where it holds itself, or is more than `MAX_DEPTH` deep."""
    if not _is_within(value, MAX_DEPTH):
        raise DocumentError(
            f"{what} holds itself, or is nested more than {MAX_DEPTH} levels deep; flatten it"
        )
    return value


def _is_within(value: object, levels: int) -> bool:
    """Whether mappings and lists in `value` stand inside each other at most `levels` deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return True
    return levels > 0 and all(_is_within(item, levels - 1) for item in value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return str(value)


def _is_json(metadata: Mapping[Any, Any]) -> bool:
    try:
        Document("", metadata=metadata).canonical()
    except DocumentError:
        return False
    return True


def _check_unchanged(value: object, where: str = "metadata") -> None:
    """Raise `TypeError` for what JSON takes and gives back otherwise: other keys, and tuples."""
    if isinstance(value, tuple):
        raise TypeError(f"{where} is a tuple, which would come back as a list; give a list")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{where} has the key {key!r}, which would come back as a string; "
                    f"give {str(key)!r}"
                )
            _check_unchanged(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for item in value:
            _check_unchanged(item, f"an item of {where}")


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved document and its score (inner product; larger is nearer).

    also: other documents of the same text, which an answer is not given a second time.
    """

    document: Document
    score: float
    also: tuple[Document, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Computed text. With `special=True` special-token strings in it are tokens.

    Only the templates of a spec or a tokenizer may be special; a special part also ends a message.
    """

    text: str
    special: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PromptError(f"the text of a Text is {self.text!r:.80}, expected a str")


@dataclass(frozen=True, slots=True)
class Passage:
    """A document whose stored keys and values are reused."""

    document: Document

    def __post_init__(self) -> None:
        if not isinstance(self.document, Document):
            raise PromptError(
                f"the document of a Passage is {self.document!r:.80}, expected a Document; "
                "use Passage(Document(text))"
            )


Part = Text | Passage
