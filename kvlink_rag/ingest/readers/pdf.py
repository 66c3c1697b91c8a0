"""PDF files to documents, one a page. The only module that knows pypdf (extra `pdf`)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import MissingExtra

from .files import Problem, ReadOptions, SourceFile, clean, reason
from .pdf_lines import columns_apart, side_by_side, turned

if TYPE_CHECKING:
    from pypdf import PageObject, PdfReader

# What a file may take: so many steps and one more for each of its bytes. A step is an operator, or
# the bytes of one; pages of real files take far more bytes of the file than they take steps.
_STEPS = 200_000
_STEPS_A_PAGE = 500  # fonts are looked at for every page anew
_BYTES_A_STEP = 10
_RANGES = 20
_DRAWING = re.compile(rb"(?<![^\s\])>])(?:Do|BI|sh|[fFSsBb]\*?)(?![^\s])")
_SHOWING = (b"Tj", b"TJ", b"'", b'"')  # operators that draw a string
_LIGATURES = dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True))
_LIGATURE = re.compile("[ﬀ-ﬆ]")
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
# A hyphen at a line's end within a word. Behind a digit, or before a capital, it is a dash.
_CUT = re.compile(
    r"(?P<first>[^\W\d_]{2,})(?P<sign>[-\u00ad\u2010])[ \t]*\n[ \t]*"
    r"(?P<second>(?=[^\W\d_])[^\WA-Z\d_]{2,})"
)
_TITLE_CHARACTERS = 200
# What word processors write where the author gave no title.
_NO_TITLE = re.compile(r"\s*$|untitled|microsoft |.*\.(docx?|tex|dvi|indd|pdf|pptx?|xlsx?)$", re.I)


def require() -> None:
    """Raise `MissingExtra` if pypdf is not installed."""
    if find_spec("pypdf") is None:
        raise MissingExtra.of("pypdf", "pdf", "reading .pdf files")


def read_pdf(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """The pages that hold text; `page` in the metadata counts from 1."""
    data = file.load(options.max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    try:
        reader = _open(data)
        pages, title = len(reader.pages), _title(reader) or file.stem
    except Exception as error:  # on broken files pypdf raises much else than its own errors
        yield Problem(file.source, f"cannot be read as PDF ({_reason(error)})")
        return
    yield from _documents(reader, pages, title, file, _Budget(_STEPS + len(data)))


def _open(data: bytes) -> PdfReader:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it needs a password; save it without one")
    return reader


def _documents(
    reader: PdfReader, pages: int, title: str, file: SourceFile, budget: _Budget
) -> Iterator[Document | Problem]:
    found, pictures = 0, []
    for number in range(1, pages + 1):
        try:
            text, draws = _page(reader, number - 1, budget)
        except _TooMuchWork:
            where, rest = f"{file.source}, page {number}", "it and all pages after it"
            yield Problem(where, f"far too much work for a file of its size; {rest} are left out")
            break
        except Exception as error:
            yield Problem(f"{file.source}, page {number}", f"cannot be read ({_reason(error)})")
            continue
        if text.strip():
            found += 1
            yield Document(text, title, metadata={"source": file.source, "page": number})
        elif draws:
            pictures.append(number)
    if not found:
        yield Problem(file.source, "no text in this PDF; a scanned one needs OCR first")
    elif pictures:
        which = f"page{'s' * (len(pictures) > 1)} {_ranges(pictures)}"
        message = f"no text on {which}, only pictures; scanned pages need OCR first"
        yield Problem(file.source, message, skipped=False)


def _page(reader: PdfReader, index: int, budget: _Budget) -> tuple[str, bool]:
    """A page's text, and whether it draws anything."""
    budget.take(_STEPS_A_PAGE)
    page = reader.pages[index]
    draws = False
    for stream in _contents(page):
        content = stream.get_data()
        budget.take(len(content) // _BYTES_A_STEP)
        draws = draws or _DRAWING.search(content) is not None
    places: list[tuple[float, float]] = []  # of each string, in the order in which they are drawn

    def step(operator: bytes, operands: Any, cm: Sequence[float], tm: Sequence[float]) -> None:
        budget.take(1)
        if operator in _SHOWING:
            places.append((tm[4] + cm[4], tm[5] + cm[5]))

    text = page.extract_text(visitor_operand_before=step)
    if side_by_side(places):
        budget.take(len(places))
        text = columns_apart(page.extract_text(extraction_mode="layout")) or text
    return _mended(turned(clean(text).replace("\0", ""))), draws


def _contents(page: PageObject) -> Iterator[Any]:
    """The streams of a page, one after the other, as often as they are named."""
    contents = page.get("/Contents")
    contents = contents.get_object() if contents is not None else None
    for part in contents if isinstance(contents, list) else [contents]:
        stream = part.get_object() if part is not None else None
        if hasattr(stream, "get_data"):
            yield stream


class _TooMuchWork(BaseException):
    """Not an `Exception`: those that come from within a page's parts are passed over by pypdf."""


class _Budget:
    """The steps that a whole file may take, so that no small file takes hours."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def take(self, steps: int) -> None:
        """So many more. Raises `_TooMuchWork`."""
        self._left -= steps
        if self._left < 0:
            raise _TooMuchWork


def _mended(text: str) -> str:
    """Letters for ligatures, and words that a line's end had cut in two."""
    text = _LIGATURE.sub(lambda match: _LIGATURES[match[0]], text)
    words = set(_WORD.findall(text))

    def mend(match: re.Match[str]) -> str:
        first, sign, second = match["first"], match["sign"], match["second"]
        whole = first + second
        compound = sign == "-" and f"{first}-{second}" in words and whole not in words
        return f"{first}-{second}" if compound else whole

    return _CUT.sub(mend, text)


def _ranges(numbers: Sequence[int]) -> str:
    """1, 3-5, 9"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ["-".join(map(str, run)) for run in runs[:_RANGES]]
    return ", ".join(shown) + (", …" if len(runs) > _RANGES else "")


def _title(reader: PdfReader) -> str:
    title = reader.metadata.title if reader.metadata else None
    if not isinstance(title, str) or _NO_TITLE.match(title):
        return ""
    return clean(" ".join(title.split()))[:_TITLE_CHARACTERS]


def _reason(error: Exception) -> str:
    if "cryptography" in str(error):
        return "it is encrypted with AES; reading it needs: pip install 'kvlink-rag[pdf]'"
    return reason(error)
