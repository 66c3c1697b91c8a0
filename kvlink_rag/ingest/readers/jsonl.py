"""JSON lines to documents: {"text", "title"?, "id"?, "metadata"?} on each line, or a list of them.

Further keys are kept as metadata. A file that is one list over several lines is read whole. Knows
that lines may be hostile: of any length, type or depth.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from kvlink_rag.documents import Document, bounded
from kvlink_rag.errors import DocumentError

from .encodings import decoded
from .files import Problem, ReadOptions, SourceFile, clean, too_large, warned

PROBLEMS_SHOWN = 5
TITLE_CHARACTERS = 1000
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_FIELDS = ("title", "id", "metadata")


def read_jsonl(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """One document a line or item. After `PROBLEMS_SHOWN` problems the others are only counted."""
    shown, skipped, warned_of = 0, 0, 0
    for found in _found(file, options):
        if isinstance(found, Document):
            yield found
        elif shown < PROBLEMS_SHOWN:
            shown += 1
            yield found
        else:
            skipped, warned_of = skipped + found.skipped, warned_of + (not found.skipped)
    if skipped:
        yield Problem(file.source, f"{skipped} more lines were skipped")
    if warned_of:
        yield Problem(file.source, f"{warned_of} more lines gave warnings", skipped=False)


def _found(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    for number, line in _lines(file, options):
        if isinstance(line, Problem):
            yield line
        else:
            place = f"{file.source}:{number}" if number else file.source
            yield from _documents(line, place, file.source, options)


def _lines(file: SourceFile, options: ReadOptions) -> Iterator[tuple[int, bytes | Problem]]:
    """Numbered lines, one at a time whatever their size: cut off after `max_bytes` + 1 bytes."""
    most = options.max_bytes
    with file.path.open("rb") as stream:
        start = stream.read(4)
        stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        if start.startswith(_WIDE) or b"\0" in start or _is_wide(options.encoding):
            yield from _wide_lines(file, options)
            return
        number = 0
        while line := stream.readline(most + 1):
            number += 1
            if number == 1 and _goes_on(line):
                yield 0, file.load(most)
                return
            yield number, line
            while len(line) > most and not line.endswith(b"\n"):
                line = stream.readline(most + 1)


def _goes_on(line: bytes) -> bool:
    """Whether a first line begins a list that ends on another one."""
    line = line.strip()
    return line.startswith(b"[") and not line.endswith(b"]")


def _is_wide(encoding: str | None) -> bool:
    return encoding is not None and "\n{".encode(encoding) != b"\n{"


def _wide_lines(file: SourceFile, options: ReadOptions) -> Iterator[tuple[int, bytes | Problem]]:
    """Lines of UTF-16 or UTF-32, where no byte always ends a line: the file is read whole."""
    data = file.load(options.max_bytes)
    if isinstance(data, Problem):
        yield 0, data
        return
    found = decoded(data, encoding=options.encoding)
    yield from ((0, problem) for problem in warned(found, file.source))
    lines = clean(found.text).encode().split(b"\n")
    if _goes_on(lines[0]):
        yield 0, b"\n".join(lines)
    else:
        yield from enumerate(lines, 1)


def _documents(
    line: bytes, place: str, path: str, options: ReadOptions
) -> Iterator[Document | Problem]:
    """The documents of one line, with its problems; nothing for a blank line."""
    if len(line) > options.max_bytes:
        yield too_large(place, "the line", options.max_bytes)
        return
    encoding = None if _is_wide(options.encoding) else options.encoding
    found = decoded(line, encoding=encoding)
    yield from warned(found, place)
    if not found.text.strip():
        return
    try:
        value = _parse(found.text.strip())
    except (DocumentError, RecursionError) as error:
        yield Problem(place, _reason(error))
        return
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, 1):
        try:
            yield _document(item, path, options.text_key)
        except (DocumentError, RecursionError) as error:
            where = f"item {number}: " if isinstance(value, list) else ""
            yield Problem(place, where + _reason(error))


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise DocumentError(f"not JSON: {error.msg} at {place} {error.colno}") from error
    except DocumentError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise DocumentError("a number has too many digits") from error


def _no_constant(name: str) -> Any:
    raise DocumentError(f"not JSON: {name} is no JSON number")


def _document(fields: object, path: str, text_key: str) -> Document:
    """Raises `DocumentError` saying which key is at fault."""
    if not isinstance(fields, dict):
        raise DocumentError(f'expected an object with "{text_key}", found {_kind(fields)}')
    if text_key not in fields:
        keys = ", ".join(map(repr, fields)) or "none"
        raise DocumentError(f'no "{text_key}"; the keys are {keys}'[:200] + _other_key(fields))
    text, title = _string(fields, text_key), _string(fields, "title", optional=True)
    if not text.strip():
        raise DocumentError(f'"{text_key}" is empty')
    if len(title) > TITLE_CHARACTERS:
        raise DocumentError(
            f'"title" has {len(title)} characters, expected at most {TITLE_CHARACTERS}'
        )
    metadata = _metadata(fields, path, text_key)
    document = Document(text, title, _identity(fields.get("id")), metadata)
    bounded(metadata)
    document.canonical()  # raises where the metadata are not JSON: 1e999 becomes infinity
    return document


def _other_key(fields: dict[str, Any]) -> str:
    """A hint at the key that the text seems to be under."""
    long = [key for key, value in fields.items() if isinstance(value, str) and " " in value]
    if not long:
        return ""
    return f"; if the text is there, give text_key={long[0]!r:.60} (kvlink-rag: --text-key)"


def _string(fields: dict[str, Any], key: str, *, optional: bool = False) -> str:
    value = fields.get(key)
    if value is None and optional:
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


def _metadata(fields: dict[str, Any], path: str, text_key: str) -> dict[str, Any]:
    """Where the line stands, its keys that are not ours, and its own metadata; the last win."""
    own = fields.get("metadata")
    if own is not None and not isinstance(own, dict):
        raise DocumentError(f'"metadata" is {_kind(own)}, expected an object')
    others = {key: value for key, value in fields.items() if key not in (*_FIELDS, text_key)}
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
