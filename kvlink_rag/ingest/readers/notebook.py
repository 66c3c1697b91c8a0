"""Jupyter notebooks to documents, as Markdown: texts, code in fences, and what it printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvlink_rag.documents import Document

from .files import Problem, ReadOptions, SourceFile, clean, reason
from .text import empty, markdown_document, texts, top_heading

_OUTPUT = 4000  # characters kept of what one cell printed
_FENCE = re.compile(r"^`{3,}", re.MULTILINE)


def read_notebook(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """One document, titled by its first top heading or the file's name. Pictures are left out."""
    for found in texts(file, options):
        yield found if isinstance(found, Problem) else _document(found, file)


def _document(found: str, file: SourceFile) -> Document | Problem:
    try:
        notebook = json.loads(found)
        language = _language(notebook)
        blocks = [_markdown(cell, language) for cell in _cells(notebook)]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else reason(error)
        return Problem(file.source, f"cannot be read as a notebook ({why})")
    text = clean("\n\n".join(filter(None, blocks)))
    return markdown_document(text, top_heading(text) or file.stem, file) if text else empty(file)


def _cells(notebook: Any) -> list[Mapping[str, Any]]:
    """Cells of a notebook of format 4, or of the worksheets of format 3."""
    if "cells" in notebook:
        return list(notebook["cells"])
    return [cell for sheet in notebook["worksheets"] for cell in sheet["cells"]]


def _language(notebook: Any) -> str:
    found = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "")
    return found if isinstance(found, str) and found.isalnum() else ""


def _markdown(cell: Mapping[str, Any], language: str) -> str:
    kind = cell.get("cell_type")
    text = _text(cell.get("source", cell.get("input", ""))).strip()
    if kind == "markdown":
        return text
    if kind == "heading":  # of format 3
        return f"{'#' * min(6, max(1, int(cell.get('level', 1))))} {text}"
    if kind != "code":
        return _fenced(text, "")
    printed = "".join(_outputs(cell)).strip()
    return "\n\n".join(filter(None, (_fenced(text, language), _fenced(printed[:_OUTPUT], ""))))


def _outputs(cell: Mapping[str, Any]) -> Iterator[str]:
    """What a cell printed or gave, as text."""
    for output in cell.get("outputs", ()):
        if output.get("output_type") == "error":
            yield f"{output.get('ename', '')}: {output.get('evalue', '')}\n"
        else:
            yield _text(output.get("text", output.get("data", {}).get("text/plain", "")))


def _text(found: Any) -> str:
    """Text that a notebook holds as one string or as lines."""
    return "".join(map(str, found)) if isinstance(found, list) else str(found)


def _fenced(text: str, language: str) -> str:
    if not text:
        return ""
    longest = max((len(found[0]) for found in _FENCE.finditer(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
