"""Word, PowerPoint and Excel files to documents: mammoth, python-pptx and openpyxl read them.

Knows that they may be hostile: `zipped` looks at each before a parser does, and what a file asks
for is bounded as a whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError, MissingExtra

from .files import Problem, ReadOptions, SourceFile, clean, reason
from .html_text import to_markdown
from .tables import markdown_table
from .text import empty, markdown_document, top_heading
from .zipped import opened

_PACKAGES = {"mammoth": ".docx", "pptx": ".pptx", "openpyxl": ".xlsx"}
_NAMES = {"pptx": "python-pptx"}
_DEPTH = 50  # of groups of shapes
_WORD_BYTES = 16 * 2**20  # of a Word file's XML, of which mammoth takes 60 times as much memory


def require() -> None:
    """Raise `MissingExtra` if a package of these formats is not installed."""
    for module, suffix in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtra.of(_NAMES.get(module, module), "office", f"reading {suffix} files")


def read_docx(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """One document: its headings, lists, tables and notes, titled by its heading or its name."""
    yield from _read(file, options, "Word document", _word, unpacked=_WORD_BYTES)


def read_pptx(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """The slides that hold text, with their notes; `slide` in the metadata counts from 1."""
    yield from _read(file, options, "presentation", _slides)


def read_xlsx(file: SourceFile, options: ReadOptions) -> Iterator[Document | Problem]:
    """The sheets that hold something, as tables of the values shown; `sheet` names each."""
    yield from _read(file, options, "workbook", _sheets)


def _read(
    file: SourceFile,
    options: ReadOptions,
    kind: str,
    documents: Callable[[bytes, SourceFile], Iterable[Document]],
    *,
    unpacked: int | None = None,
) -> Iterator[Document | Problem]:
    data = file.load(options.max_bytes)
    if isinstance(data, Problem):
        yield data
        return
    found = False
    try:
        opened(data, min(options.max_bytes, unpacked or options.max_bytes)).close()
        for document in documents(data, file):
            found = True
            yield document
    except DocumentError as error:
        yield Problem(file.source, f"cannot be read as a {kind}: {error}")
        return
    except Exception as error:  # on broken files these parsers raise much else than their own
        yield Problem(file.source, f"cannot be read as a {kind} ({reason(error)})")
        return
    if not found:
        yield empty(file)


def _word(data: bytes, file: SourceFile) -> Iterator[Document]:
    import mammoth

    no_pictures = mammoth.images.img_element(lambda image: {"src": ""})
    html = mammoth.convert_to_html(io.BytesIO(data), convert_image=no_pictures).value
    text = clean(to_markdown(html, whole=True).text)
    if text.strip():
        yield markdown_document(text, top_heading(text) or file.stem, file)


def _slides(data: bytes, file: SourceFile) -> Iterator[Document]:
    from pptx import Presentation

    deck = Presentation(io.BytesIO(data))
    title = " ".join((deck.core_properties.title or "").split())
    name = title if title and title != "PowerPoint Presentation" else file.stem
    for number, slide in enumerate(deck.slides, 1):
        heading = slide.shapes.title
        blocks = list(_blocks(slide.shapes, heading))
        if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) is not None:
            blocks.append(notes.text)
        text = "\n\n".join(block for block in map(_plain, blocks) if block)
        own = _plain(heading.text_frame.text).replace("\n", " ") if heading is not None else ""
        if text or own:
            made = markdown_document(clean(text or own), clean(own or name), file)
            yield Document(made.text, made.title, metadata={**made.metadata, "slide": number})


def _blocks(shapes: Iterable[Any], heading: Any, depth: int = 0) -> Iterator[str]:
    """Texts and tables of a slide's shapes, groups opened; its heading left out."""
    for shape in shapes:
        if heading is not None and shape.shape_id == heading.shape_id:
            continue
        if hasattr(shape, "shapes"):
            if depth < _DEPTH:
                yield from _blocks(shape.shapes, heading, depth + 1)
        elif getattr(shape, "has_table", False):
            yield markdown_table([cell.text for cell in row.cells] for row in shape.table.rows)
        elif shape.has_text_frame:
            yield shape.text_frame.text


def _plain(text: str) -> str:
    """A block's text; vertical tabs are PowerPoint's line breaks."""
    return text.replace("\v", "\n").strip()


def _sheets(data: bytes, file: SourceFile) -> Iterator[Document]:
    from openpyxl import load_workbook

    book = load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # what the file says of them would be filled with empty cells
        if table := markdown_table(sheet.iter_rows(values_only=True)):
            alone = len(book.worksheets) == 1
            title = file.stem if alone else f"{file.stem}: {clean(sheet.title)}"
            made = markdown_document(table, title, file)
            yield Document(
                made.text, made.title, metadata={**made.metadata, "sheet": clean(sheet.title)}
            )
