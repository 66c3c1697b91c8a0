"""JSON lines to documents: {"text", "title"?, "id"?, "metadata"?} on each line.

Further keys are kept as metadata. Knows that lines may be hostile: of any length, type or depth.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError

from .files import Problem, SourceFile, clean, decode, too_large

PROBLEMS_SHOWN = 5
TITLE_CHARACTERS = 1000
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_FIELDS = ("text", "title", "id", "metadata")


def read_jsonl(file: SourceFile, max_bytes: int) -> Iterator[Document | Problem]:
    """One document a line. After `PROBLEMS_SHOWN` problems the others are only counted."""
    shown, skipped, warned = 0, 0, 0
    for found in _found(file, max_bytes):
        if isinstance(found, Document):
            yield found
        elif shown < PROBLEMS_SHOWN:
            shown += 1
            yield found
        else:
            skipped, warned = skipped + found.skipped, warned + (not found.skipped)
    if skipped:
        yield Problem(file.source, f"{skipped} more lines were skipped")
    if warned:
        yield Problem(file.source, f"{warned} more lines gave warnings", skipped=False)


def _found(file: SourceFile, max_bytes: int) -> Iterator[Document | Problem]:
    for number, line in _lines(file, max_bytes):
        if isinstance(line, Problem):
            yield line
        else:
            yield from _documents(line, f"{file.source}:{number}", file.source, max_bytes)


def _lines(file: SourceFile, max_bytes: int) -> Iterator[tuple[int, bytes | Problem]]:
    """Numbered lines, one at a time whatever their size: cut off after `max_bytes` + 1 bytes."""
    with file.path.open("rb") as stream:
        start = stream.read(4)
        stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        if start.startswith(_WIDE):
            yield from _wide_lines(file, max_bytes)
            return
        number = 0
        while line := stream.readline(max_bytes + 1):
            number += 1
            yield number, line
            while len(line) > max_bytes and not line.endswith(b"\n"):
                line = stream.readline(max_bytes + 1)


def _wide_lines(file: SourceFile, max_bytes: int) -> Iterator[tuple[int, bytes | Problem]]:
    """Lines of UTF-16 or UTF-32, where no byte always ends a line: the file is read whole."""
    data = file.load(max_bytes)
    if isinstance(data, Problem):
        yield 0, data
        return
    text, problems = decode(data, file.source)
    yield from ((0, problem) for problem in problems)
    yield from enumerate((line.encode() for line in text.split("\n")), 1)


def _documents(line: bytes, source: str, path: str, max_bytes: int) -> Iterator[Document | Problem]:
    """The document of one line, with its problems; nothing for a blank line."""
    if len(line) > max_bytes:
        yield too_large(source, "the line", max_bytes)
        return
    text, problems = decode(line, source)
    yield from problems
    if not text.strip() or any(problem.skipped for problem in problems):
        return
    try:
        yield _document(_parse(text.strip()), path)
    except (DocumentError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        yield Problem(source, str(reason))


def _parse(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON: {error.msg} at column {error.colno}") from error
    except DocumentError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise DocumentError("a number has too many digits") from error
    if not isinstance(fields, dict):
        raise DocumentError(f'expected an object with "text", found {_kind(fields)}')
    return fields


def _no_constant(name: str) -> Any:
    raise DocumentError(f"not JSON: {name} is no JSON number")


def _document(fields: dict[str, Any], path: str) -> Document:
    """Raises `DocumentError` saying which key is at fault."""
    if "text" not in fields:
        raise DocumentError(
            f'no "text"; the keys are {", ".join(map(repr, fields)) or "none"}'[:200]
        )
    text, title = _string(fields, "text"), _string(fields, "title")
    if not text.strip():
        raise DocumentError('"text" is empty')
    if len(title) > TITLE_CHARACTERS:
        raise DocumentError(
            f'"title" has {len(title)} characters, expected at most {TITLE_CHARACTERS}'
        )
    document = Document(text, title, _identity(fields.get("id")), _metadata(fields, path))
    document.canonical()  # raises where the metadata are not JSON: 1e999 becomes infinity
    return document


def _string(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if value is None and key != "text":
        return ""
    if not isinstance(value, str):
        raise DocumentError(f'"{key}" is {_kind(value)}, expected a string')
    return clean(value)


def _identity(value: object) -> str | None:
    """An id as a string; whole numbers are common in data sets and are written out."""
    if value is None or (isinstance(value, str) and value):
        return clean(value) if value else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DocumentError(f'"id" is {_kind(value)}, expected a non-empty string or a whole number')


def _metadata(fields: dict[str, Any], path: str) -> dict[str, Any]:
    """Where the line stands, its keys that are not ours, and its own metadata; the last win."""
    own = fields.get("metadata")
    if own is not None and not isinstance(own, dict):
        raise DocumentError(f'"metadata" is {_kind(own)}, expected an object')
    others = {key: value for key, value in fields.items() if key not in _FIELDS}
    cleaned = _cleaned({"source": path, **others, **(own or {})})
    return dict(cleaned)


def _cleaned(value: Any) -> Any:
    """`value` with lone surrogates replaced in all its strings."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    return value


def _kind(value: object) -> str:
    """A JSON value's type in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    if value == "":
        return "an empty string"
    return "null" if value is None else names.get(type(value), "a number")
