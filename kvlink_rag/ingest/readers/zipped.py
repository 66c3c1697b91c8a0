"""Documents that are zip files of XML: opened, and looked at before any parser sees them.

Knows that they may be hostile: far more bytes than they seem, XML that multiplies itself, names
that lead elsewhere. Knows no format.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib

from kvlink_rag.errors import DocumentError

from .files import reason

MOST_PARTS = 20_000
_XML = (".xml", ".rels", ".opf", ".ncx", ".xhtml", ".html", ".htm", ".vml")
_ENTITY = re.compile(rb"<!ENTITY|<\0!\0E\0N\0T\0I\0T\0Y\0|\0<\0!\0E\0N\0T\0I\0T\0Y", re.IGNORECASE)
_BEFORE_2007 = b"\xd0\xcf\x11\xe0"  # also what an encrypted document of today is wrapped in
BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError)


def opened(data: bytes, max_bytes: int) -> zipfile.ZipFile:
    """The zip file in `data`. Raises `DocumentError` for what is none, damaged, locked or a bomb.

    max_bytes: the most bytes of all its XML together, unpacked.
    """
    if data.startswith(_BEFORE_2007):
        raise DocumentError(
            "it needs a password, or is of the format before 2007; save it anew, without one"
        )
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        parts = [part for part in archive.infolist() if part.filename.lower().endswith(_XML)]
        _bounded(len(archive.infolist()), sum(part.file_size for part in parts), max_bytes)
        for part in parts:
            if _ENTITY.search(archive.read(part)):
                raise DocumentError(f"{part.filename!r:.80} in it defines entities of XML")
    except BROKEN as error:
        raise DocumentError(f"it is no whole zip file ({reason(error)})") from error
    return archive


def _bounded(parts: int, size: int, max_bytes: int) -> None:
    if parts > MOST_PARTS:
        raise DocumentError(f"found {parts:,} parts in it, expected at most {MOST_PARTS:,}")
    if size > max_bytes:
        raise DocumentError(
            f"unpacked, its text is {size / 2**20:,.0f} MiB, more than {max_bytes / 2**20:g} MiB; "
            "split it"
        )
