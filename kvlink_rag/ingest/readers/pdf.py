"""PDF files to documents, one a page. The only module that knows pypdf (extra `pdf`)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvlink_rag.documents import Document
from kvlink_rag.errors import MissingExtra

from .files import Problem, SourceFile, clean

if TYPE_CHECKING:
    from pypdf import PdfReader

_TITLE_CHARACTERS = 200
# What word processors write where the author gave no title.
_NO_TITLE = re.compile(r"\s*$|untitled|microsoft |.*\.(docx?|tex|dvi|indd|pdf|pptx?|xlsx?)$", re.I)


def require() -> None:
    """Raise `MissingExtra` if pypdf is not installed."""
    if find_spec("pypdf") is None:
        raise MissingExtra.of("pypdf", "pdf", "reading .pdf files")


def read_pdf(file: SourceFile, max_bytes: int) -> Iterator[Document | Problem]:
    """The pages that hold text; `page` in the metadata counts from 1."""
    data = file.load(max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    try:
        reader = _open(data)
        pages, title = len(reader.pages), _title(reader) or file.stem
    except Exception as error:  # on broken files pypdf raises much else than its own errors
        yield Problem(file.source, f"cannot be read as PDF ({_reason(error)})")
        return
    yield from _pages(reader, pages, title, file)


def _open(data: bytes) -> PdfReader:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it needs a password; save it without one")
    return reader


def _pages(
    reader: PdfReader, pages: int, title: str, file: SourceFile
) -> Iterator[Document | Problem]:
    found = 0
    for number in range(1, pages + 1):
        try:
            text = clean(reader.pages[number - 1].extract_text()).replace("\0", "")
        except Exception as error:
            yield Problem(f"{file.source}, page {number}", f"cannot be read ({_reason(error)})")
            continue
        if text.strip():
            found += 1
            yield Document(text, title, metadata={"source": file.source, "page": number})
    if not found:
        yield Problem(file.source, "no text in this PDF; a scanned one needs OCR first")


def _title(reader: PdfReader) -> str:
    title = reader.metadata.title if reader.metadata else None
    if not isinstance(title, str) or _NO_TITLE.match(title):
        return ""
    return clean(" ".join(title.split()))[:_TITLE_CHARACTERS]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
