"""Office files, books, tables and notebooks: what is read, where it stands, and hostile ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvlink_rag import Document
from kvlink_rag.errors import MissingExtra
from kvlink_rag.ingest.readers import Problem, find, read_paths, tables, zipped
from kvlink_rag.ingest.splitter import split_document

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(name: str, data: bytes | str, **limits: Any) -> tuple[list[Document], list[Problem]]:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    problems: list[Problem] = []
    return list(read_paths([name], on_problem=problems.append, **limits)), problems


def one(name: str, data: bytes | str) -> Document:
    (document,), problems = read(name, data)
    assert not problems
    return document


def only_problem(name: str, data: bytes | str, **limits: Any) -> str:
    documents, (problem,) = read(name, data, **limits)
    assert not documents
    return str(problem)


def packed(parts: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def docx(body: str, **parts: str) -> bytes:
    """A Word file written by hand; `body` is what stands in its body."""
    style = '<w:style w:type="paragraph" w:styleId="H%d"><w:name w:val="heading %d"/></w:style>'
    return packed(
        {
            "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
            '<Default Extension="xml" ContentType="application/xml"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship '
            f'Id="r1" Type="{OFFICE}/officeDocument" Target="word/document.xml"/>'
            "</Relationships>",
            "word/styles.xml": f'<w:styles xmlns:w="{WORD}">{style % (1, 1)}{style % (2, 2)}'
            "</w:styles>",
            "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body>'
            "</w:document>",
            **parts,
        }
    )


def paragraph(text: str, heading: int = 0) -> str:
    style = f'<w:pPr><w:pStyle w:val="H{heading}"/></w:pPr>' if heading else ""
    return f"<w:p>{style}<w:r><w:t>{text}</w:t></w:r></w:p>"


def table(*rows: tuple[str, ...]) -> str:
    cells = ("".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) for row in rows)
    return "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"


def saved(save: Callable[[Any], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def test_word_files_keep_headings_order_and_tables() -> None:
    pytest.importorskip("mammoth")
    body = (
        paragraph("Ferries", 1)
        + paragraph("They run daily.")
        + paragraph("Fares", 2)
        + table(("Who", "Crowns"), ("Adult", "12"), ("Child", "7"))
        + paragraph("Dogs go free.")
    )
    document = one("f.docx", docx(body))
    assert document.title == "Ferries"
    assert document.metadata["source"] == "f.docx"
    lines = [line for line in document.text.splitlines() if line]
    assert lines[:3] == ["# Ferries", "They run daily.", "## Fares"]
    assert any("Adult" in line and "12" in line for line in lines)
    assert lines[-1] == "Dogs go free."
    assert one("plain.docx", docx(paragraph("No heading."))).title == "plain"


def test_slides_are_documents_with_their_numbers_tables_and_notes() -> None:
    pptx = pytest.importorskip("pptx")
    deck = pptx.Presentation()
    first = deck.slides.add_slide(deck.slide_layouts[1])
    first.shapes.title.text = "Harbour"
    first.placeholders[1].text = "Built in 1911\vby Orvale"
    first.notes_slide.notes_text_frame.text = "Mention the crane."
    deck.slides.add_slide(deck.slide_layouts[6])
    third = deck.slides.add_slide(deck.slide_layouts[5])
    third.shapes.title.text = "Fares"
    cells = third.shapes.add_table(2, 2, 0, 0, 9_000_000, 900_000).table
    for place, text in zip(
        ((0, 0), (0, 1), (1, 0), (1, 1)), ("Who", "Fee", "Dog", "0"), strict=True
    ):
        cells.cell(*place).text = text
    documents, problems = read("d.pptx", saved(deck.save))
    assert not problems
    assert [(d.title, d.metadata["slide"]) for d in documents] == [("Harbour", 1), ("Fares", 3)]
    assert documents[0].text == "Built in 1911\nby Orvale\n\nMention the crane."
    assert documents[1].text == "| Who | Fee |\n| --- | --- |\n| Dog | 0 |"


def test_sheets_are_tables_of_values() -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "Fares"
    for row in (["Who", "Crowns", None], ["A | B", 12.5, None], [], ["Dog\nor cat", 0, None]):
        book.active.append(row)
    book.create_sheet("Empty")
    book.create_sheet("Times")["C3"] = "08:15"
    documents, problems = read("b.xlsx", saved(book.save))
    assert not problems
    assert [(d.title, d.metadata["sheet"]) for d in documents] == [
        ("b: Fares", "Fares"),
        ("b: Times", "Times"),
    ]
    assert documents[0].text == (
        "| Who | Crowns |\n| --- | --- |\n| A \\| B | 12.5 |\n| Dog or cat | 0 |"
    )
    assert "08:15" in documents[1].text


def test_what_a_sheet_says_of_its_size_costs_nothing() -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active["A1"] = "x"
    old = zipfile.ZipFile(io.BytesIO(saved(book.save)))
    parts: dict[str, str | bytes] = {name: old.read(name) for name in old.namelist()}
    sheet = old.read("xl/worksheets/sheet1.xml").decode()
    parts["xl/worksheets/sheet1.xml"] = sheet.replace('ref="A1"', 'ref="A1:XFD1048576"')
    assert one("b.xlsx", packed(parts)).text == "x"


def test_books_are_read_by_chapters_in_reading_order() -> None:
    page = "<html><head><title>%s</title></head><body><h1>%s</h1><p>%s</p></body></html>"
    manifest = "".join(
        f'<item id="{name}" href="text/{name}%20x.xhtml" media-type="application/xhtml+xml"/>'
        for name in "ab"
    )
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<metadata><dc:title>The  Tarn</dc:title></metadata><manifest>{manifest}</manifest>"
        '<spine><itemref idref="b"/><itemref idref="a"/><itemref idref="b"/></spine></package>'
    )
    book = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:'
        'container"><rootfiles><rootfile full-path="OEBPS/p.opf"/></rootfiles></container>',
        "OEBPS/p.opf": package,
        "OEBPS/text/a x.xhtml": page % ("Second", "Second", "It is deep."),
        "OEBPS/text/b x.xhtml": page % ("First", "First", "A lake."),
    }
    documents, problems = read("t.epub", packed(dict(book)))
    assert not problems
    assert [(d.title, d.metadata["chapter"]) for d in documents] == [
        ("The Tarn: First", 1),
        ("The Tarn: Second", 2),
    ]
    assert documents[0].text == "# First\n\nA lake."
    del book["META-INF/container.xml"]
    assert "cannot be read as EPUB" in only_problem("t.epub", packed(dict(book)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'Who,Fee\n"Dog, small",7\n', [["Who", "Fee"], ["Dog, small", "7"]]),
        ("a.csv", "Who;Fee\nDog;1,5\nCat;2,5\n", [["Who", "Fee"], ["Dog", "1,5"], ["Cat", "2,5"]]),
        ("a.tsv", "Who\tFee\nDog, big\t7\n", [["Who", "Fee"], ["Dog, big", "7"]]),
        (
            "a.csv",
            '\ufeffWho,Fee\r\nDog,"two\r\nlines"\r\n',
            [["Who", "Fee"], ["Dog", "two lines"]],
        ),
        ("a.csv", "Who,Fee,\nDog,7,,\n,,\n", [["Who", "Fee"], ["Dog", "7"]]),
        ("a.csv", "A,B\n1\n1,2,3\n", [["A", "B", ""], ["1", "", ""], ["1", "2", "3"]]),
    ],
)
def test_tables_of_text(name: str, content: str, expected: list[list[str]]) -> None:
    document = one(name, content)
    lines = [f"| {' | '.join(row)} |" for row in expected]
    rule = f"| {' | '.join(['---'] * len(expected[0]))} |"
    assert document.text.splitlines() == [lines[0], rule, *lines[1:]]
    assert document.title == "a"


def test_a_long_table_has_its_header_in_every_passage() -> None:
    class Words:
        def encode(self, text: str) -> list[int]:
            return [0] * len(text.split())

    rows = "".join(f"dog {i},{i}\n" for i in range(200))
    passages = list(split_document(one("a.csv", "Who,Fee\n" + rows), Words(), 100))
    assert len(passages) > 5
    assert all(p.text.startswith("| Who | Fee |") for p in passages)
    found = "\n".join(p.text for p in passages)
    assert all(f"| dog {i} | {i} |" in found for i in range(200))


def test_notebooks_are_markdown_with_code_and_what_it_printed() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Fares\n", "How much?"]},
        {
            "cell_type": "code",
            "source": "print('```')",
            "outputs": [
                {"output_type": "stream", "text": ["12 crowns\n"]},
                {
                    "output_type": "display_data",
                    "data": {"image/png": "AAAA", "text/plain": "<Fig>"},
                },
                {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []},
            ],
        },
        {"cell_type": "raw", "source": ""},
    ]
    notebook = {"cells": cells, "metadata": {"kernelspec": {"language": "python"}}, "nbformat": 4}
    document = one("n.ipynb", json.dumps(notebook))
    assert document.title == "Fares"
    assert document.text == (
        "# Fares\nHow much?\n\n```python\nprint('```')\n```\n\n"
        "```\n12 crowns\n<Fig>KeyError: 'x'\n```"
    )
    for broken in ("{", "[]", '{"cells": 3}', '{"cells": [3]}', "[" * 100_000):
        assert "cannot be read as a notebook" in only_problem("n.ipynb", broken)
    assert "no text" in only_problem("n.ipynb", '{"cells": []}')


KINDS = [("f.docx", "mammoth"), ("f.pptx", "pptx"), ("f.xlsx", "openpyxl"), ("f.epub", None)]


@pytest.mark.parametrize(("name", "package"), KINDS)
def test_what_is_no_such_file_is_one_problem(name: str, package: str | None) -> None:
    if package:
        pytest.importorskip(package)
    for data in (b"", b"no zip", packed({}), packed({"a.xml": "<a"}), docx("")[:300]):
        assert "cannot be read as" in only_problem(name, data)
    assert "needs a password" in only_problem(name, b"\xd0\xcf\x11\xe0 and more")


@pytest.mark.parametrize(("name", "package"), KINDS)
def test_bombs_are_refused_before_they_are_parsed(name: str, package: str | None) -> None:
    if package:
        pytest.importorskip(package)
    big = packed({"word/document.xml": b" " * 5_000_000})
    assert len(big) < 20_000
    assert "unpacked, its text is 5 MiB, more than 1 MiB" in only_problem(
        name, big, max_bytes=2**20
    )
    many = packed({f"{i}": "" for i in range(zipped.MOST_PARTS + 1)})
    assert "parts in it" in only_problem(name, many)
    laughs = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><x>&b;</x>'
    for encoding in ("utf-8", "utf-16"):
        bomb = packed({"word/document.xml": laughs.encode(encoding)})
        assert "defines entities" in only_problem(name, bomb)


def test_a_sheet_of_far_too_many_cells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_CELLS", 1000)
    assert "more than 1,000 cells" in only_problem("a.csv", "a,b\n" * 600)
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active["XFD1"] = "x"
    assert "more than 1,000 cells" in only_problem("a.xlsx", saved(book.save))


@pytest.mark.parametrize("seed", range(20))
def test_damaged_files_give_text_or_problems(seed: int) -> None:
    pytest.importorskip("mammoth")
    data = bytearray(docx(paragraph("One.") * 50 + table(("a", "b"))))
    for place in range(seed, len(data), 97):
        data[place] ^= 1 << seed % 8
    documents, problems = read("f.docx", bytes(data))
    assert documents or problems


def test_a_missing_package_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("f.docx").write_bytes(docx(paragraph("x")))
    monkeypatch.setattr("kvlink_rag.ingest.readers.office.find_spec", lambda *_: None)
    with pytest.raises(MissingExtra, match=r"pip install 'kvlink-rag\[office\]'"):
        find(["f.docx"], print)
