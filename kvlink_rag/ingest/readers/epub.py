"""EPUB books to documents: a chapter each, in reading order, read as HTML."""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from urllib.parse import unquote
from zipfile import ZipFile

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError

from .files import Problem, ReadOptions, SourceFile, reason
from .html import read_page
from .text import empty
from .zipped import BROKEN, opened

_CONTAINER = "META-INF/container.xml"
_PAGES = ("application/xhtml+xml", "text/html")


def read_epub(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """The chapters that hold text, by the book's title and theirs; `chapter` counts from 1."""
    data = file.load(options.max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    try:
        with opened(data, options.max_bytes) as archive:
            title, names = _book(archive)
            pages = [(name, archive.read(name)) for name in names if name in archive.namelist()]
    except (DocumentError, xml.ParseError, LookupError, AttributeError, *BROKEN) as error:
        why = str(error) if isinstance(error, DocumentError) else reason(error)
        yield Problem(file.source, f"cannot be read as EPUB ({why})")
        return
    number = 0
    for name, page in pages:
        for found in read_page(page, f"{file.source}, {name}", file):
            if isinstance(found, Problem):
                yield found
                continue
            number += 1
            chapter = found.title if found.title != file.stem else ""
            heading = f"{title}: {chapter}" if chapter and chapter != title else title
            metadata = {**found.metadata, "chapter": number}
            yield Document(found.text, heading or file.stem, metadata=metadata)
    if not number:
        yield empty(file)


def _book(archive: ZipFile) -> tuple[str, list[str]]:
    """A book's title, and the names of its pages in reading order."""
    container = xml.fromstring(archive.read(_CONTAINER))
    root = container.find(".//{*}rootfile").attrib["full-path"]  # type: ignore[union-attr]
    package = xml.fromstring(archive.read(root))
    items = {item.attrib["id"]: item.attrib for item in package.iterfind(".//{*}manifest/{*}item")}
    names = []
    for reference in package.iterfind(".//{*}spine/{*}itemref"):
        item = items.get(reference.attrib.get("idref", ""))
        if item is not None and item.get("media-type") in _PAGES:
            names.append(
                posixpath.normpath(posixpath.join(posixpath.dirname(root), unquote(item["href"])))
            )
    title = package.find(".//{http://purl.org/dc/elements/1.1/}title")
    text = "" if title is None else " ".join("".join(title.itertext()).split())
    return text[:200], list(dict.fromkeys(names))
