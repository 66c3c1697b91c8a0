"""Readers: every kind of file, and what hostile or broken ones give."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import tracemalloc
import zlib
from pathlib import Path
from random import Random

import pytest
from work import calls_of

from kvlink_rag.documents import Document
from kvlink_rag.errors import ConfigError, DocumentError, MissingExtra
from kvlink_rag.ingest.markdown import headings
from kvlink_rag.ingest.readers import Problem, read_paths
from kvlink_rag.ingest.readers.html_text import to_markdown
from kvlink_rag.ingest.readers.pdf import _Budget, _mended, _open, _page, _TooMuchWork
from kvlink_rag.ingest.readers.pdf_lines import turned
from kvlink_rag.ingest.splitter import split_document


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    )
    return path


def read(*paths: str | Path, **limits: int) -> tuple[list[Document], list[Problem]]:
    problems: list[Problem] = []
    return list(read_paths(paths, on_problem=problems.append, **limits)), problems


def one(*paths: str | Path) -> Document:
    (document,), problems = read(*paths)
    assert not problems
    return document


def only_problem(*paths: str | Path, **limits: int) -> str:
    documents, (problem,) = read(*paths, **limits)
    assert not documents
    assert "\n" not in str(problem)
    return str(problem)


# ── folders ──────────────────────────────────────────────────────────────────────────────────


def test_folders_are_read_in_order_without_hidden_and_unknown_files():
    names = ("b/z.txt", "b/A.TXT", "a.txt", "c.md", ".hidden/x.txt", "b/.x.txt")
    for name in (*names, "b/x.doc", "b/y.doc", "x.png"):
        write(f"docs/{name}", "some text")
    documents, (problem,) = read("docs")
    assert [d.metadata["source"] for d in documents] == [
        "docs/a.txt",
        "docs/b/A.TXT",
        "docs/b/z.txt",
        "docs/c.md",
    ]
    assert not problem.skipped
    assert str(problem) == (
        "docs: 3 files of unknown kinds passed over (2 .doc, 1 .png): "
        "docs/b/x.doc, docs/b/y.doc, docs/x.png"
    )


def test_programs_and_files_known_by_name_are_text():
    for name in ("a.py", "b.rs", "Makefile", "README", "c.yaml"):
        write(f"src/{name}", "# a comment\n")
    documents, problems = read("src")
    assert not problems
    assert [d.title for d in documents] == ["Makefile", "README", "a.py", "b.rs", "c.yaml"]
    assert {d.text for d in documents} == {"# a comment\n"}


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("=====\nGuide\n=====\n\nText.", "Guide"),
        (".. note:: x\n\nGuide\n-----\n\nText.", "Guide"),
        ("Only text.\nMore.", "page"),
    ],
)
def test_restructured_text(text, title):
    write("page.rst", text)
    assert one("page.rst") == Document(text, title, metadata={"source": "page.rst"})


def test_a_hidden_path_that_is_named_is_read_and_no_file_twice():
    write(".notes/a.txt", "x")
    documents, _ = read(".notes", ".notes/a.txt", ".notes")
    assert [d.metadata["source"] for d in documents] == [".notes/a.txt"]


def test_the_current_folder_gives_plain_names():
    write("a.txt", "x")
    assert one(".").metadata == {"source": "a.txt"}


def test_loops_of_links_end_and_links_to_elsewhere_are_followed():
    write("docs/sub/a.txt", "x")
    write("elsewhere/b.txt", "y")
    Path("docs/sub/up").symlink_to(Path("docs").resolve())
    Path("docs/self").symlink_to("self")
    Path("docs/other").symlink_to(Path("elsewhere").resolve())
    documents, problems = read("docs")
    assert [d.metadata["source"] for d in documents] == ["docs/other/b.txt", "docs/sub/a.txt"]
    assert [str(p) for p in problems] == [
        "docs/sub/up: the same folder as docs; read there, skipped here"
    ]
    assert not problems[0].skipped


def test_a_link_to_a_folder_above_does_not_bring_in_that_folder():
    write("docs/a.txt", "x")
    write("private/b.txt", "y")
    Path("docs/up").symlink_to("..")
    documents, problems = read("docs")
    assert [d.metadata["source"] for d in documents] == ["docs/a.txt"]
    above = Path().resolve().as_posix()
    assert [str(p) for p in problems] == [
        f"docs/up: a link to {above}, a folder above it; not followed"
    ]
    documents, problems = read("docs", ".")  # named, the folder above is read
    assert [d.metadata["source"] for d in documents] == ["docs/a.txt", "private/b.txt"]
    assert len(problems) == 1


def test_folders_nested_deeper_than_the_stack():
    here = os.getcwd()
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("a.txt").write_text("deep")
    os.chdir(here)
    documents, _ = read("d")
    subprocess.run(["rm", "-r", "d"], check=True)  # deeper than pytest's own clean-up can go
    assert [d.text for d in documents] == ["deep"]


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda: None, "gone", "no such file or folder"),
        (lambda: write("a.xyz", "x"), "a.xyz", "not a file of a known kind; known are .txt, .md,"),
        (lambda: os.mkdir("empty"), "empty", "no .txt, .md,"),
        (lambda: os.mkfifo("pipe.txt"), "pipe.txt", "not a file of a known kind"),
        (lambda: Path("l.txt").symlink_to("gone"), "l.txt", "no such file or folder"),
    ],
)
def test_paths_that_give_nothing(make, path, message):
    make()
    assert only_problem(path).startswith(f"{path}: {message}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read():
    write("a.txt", "x").chmod(0)
    assert "denied" in only_problem("a.txt").lower()


def test_problems_do_not_stop_the_rest_but_raise_without_a_handler():
    write("a.txt", b"\0\1\2")
    write("b.txt", "good")
    documents, problems = read("gone", "a.txt", "b.txt")
    assert [d.text for d in documents] == ["good"]
    assert len(problems) == 2
    with pytest.raises(DocumentError, match="gone: no such file"):
        list(read_paths(["gone", "b.txt"]))


def test_a_warning_without_a_handler_is_logged(caplog):
    write("a.txt", b"x" * 500 + b"\xff")
    assert [d.text for d in read_paths(["a.txt"])] == ["x" * 500 + "\ufffd"]
    assert "a.txt: not UTF-8 at byte 500" in caplog.text


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.pdf"])
def test_a_file_over_the_limit(name):
    write(name, "x" * 101)
    assert only_problem(name, max_bytes=100) == (
        f"{name}: the file is larger than 100 bytes; split it, or raise the limit"
    )


# ── text ─────────────────────────────────────────────────────────────────────────────────────

TEXT = "Grüße, 你好\nzweite Zeile"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
    ],
)
def test_encodings_and_line_ends(data):
    write("notes.txt", data)
    assert one("notes.txt") == Document(TEXT, "notes", metadata={"source": "notes.txt"})


@pytest.mark.parametrize(
    "data", ["é".encode() * 9 + b"\xe9", b"ok \xed\xa0\x80", b"\xff\xfea\x00\x00\xd8"]
)
def test_undecodable_bytes_are_replaced_with_a_warning(data):
    write("a.txt", data)
    (document,), (problem,) = read("a.txt")
    assert "\ufffd" in document.text
    document.text.encode()
    assert not problem.skipped
    assert "replaced" in problem.message


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_files_without_text_warn(name):
    write(name, " \n\t")
    assert only_problem(name) == f"{name}: no text in this file"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_binary_files_are_told(name):
    write(name, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 9)
    assert "not a text file" in only_problem(name)


def test_a_name_that_is_no_unicode():
    Path(os.fsdecode(b"caf\xe9.txt")).write_text("x")
    document = one(".")
    assert (document.title, document.metadata) == ("caf\ufffd", {"source": "caf\ufffd.txt"})


GREETING = {
    "cp1252": "Über dem Café „Zur Mühle“ wohnt für 80 € – ganz billig – Herr Größe.",
    "cp932": "灯台は1911年に建てられた。港の北にある。",
    "gb18030": "灯塔建于一九一一年，位于港口的北边。",
    "cp949": "등대는 1911년에 세워졌다. 항구의 북쪽에 있다.",
    "cp1251": "Паром отходит от седьмого причала в полночь.",
    "koi8_r": "Паром отходит от седьмого причала в полночь.",
    "iso2022_jp": "灯台は1911年に建てられた。",
    "utf_16_le": "The mill stands by the river.",
    "utf_16_be": "Паром отходит от седьмого причала.",
}


@pytest.mark.parametrize("encoding", GREETING)
def test_other_encodings_are_found_and_said(encoding):
    text = GREETING[encoding]
    write("a.txt", text.encode(encoding))
    (document,), problems = read("a.txt")
    assert document.text == text
    assert all(encoding in p.message and not p.skipped for p in problems)
    assert problems or encoding == "iso2022_jp"


@pytest.mark.parametrize("text", ["café", "5 €", "£5", "it’s", "São Paulo", "Größe: 5 m²", "½ cup"])
def test_short_texts_are_western(text):
    write("a.txt", text.encode("cp1252"))
    assert read("a.txt")[0][0].text == text


def test_an_encoding_may_be_forced():
    write("a.txt", "Işığın yanı".encode("cp1254"))
    assert read_with("a.txt", encoding="cp1254") == ["Işığın yanı"]
    write("d.jsonl", '{"text": "Łódź"}\n{"text": "é"}'.encode("iso8859-2"))
    assert read_with("d.jsonl", encoding="iso8859-2") == ["Łódź", "é"]
    write("d.jsonl", '{"text": "Łódź"}\n{"text": "é"}'.encode("utf-16-le"))
    assert read_with("d.jsonl", encoding="utf-16-le") == ["Łódź", "é"]
    with pytest.raises(ConfigError, match="no encoding 'klingon'"):
        read_with("a.txt", encoding="klingon")
    with pytest.raises(ConfigError, match="no encoding of text"):
        read_with("a.txt", encoding="base64")


def read_with(path: str, **options: str) -> list[str]:
    return [d.text for d in read_paths([path], **options)]


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\x81"])
def test_one_bad_byte_changes_nothing_else(bad):
    before, after = "Der Kran am Fluß ist grün. " * 40, " Er hält."
    write("a.txt", before.encode() + bad + after.encode())
    (document,), (problem,) = read("a.txt")
    assert document.text == f"{before}\ufffd{after}"
    assert f"at byte {len(before.encode())}" in problem.message


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n\n# The guide\n\nx", "The guide"),
        ("The guide\n=========\nx", "The guide"),
        ('---\nlayout: post\ntitle: "The guide"\n---\n# Other\nx', "The guide"),
        ("## Only a part\n\nx", "file-name"),
        ("no heading", "file-name"),
        ("```\n# code\n```\n", "file-name"),
        ("---\nnot closed\n# H\nx", "H"),
    ],
)
def test_markdown_titles(text, title):
    write("file-name.md", text)
    assert one("file-name.md").title == title


def test_front_matter_is_no_text():
    write("a.md", "---\ntitle: T\ntags: [x]\n---\nbody\n\n---\n\nmore")
    assert one("a.md").text == "body\n\n---\n\nmore"


@pytest.mark.parametrize(
    ("matter", "title", "fields"),
    [
        ("---\n# by a tool\ntitle: A\n---\n", "A", {}),
        ("---\ntitle: >-\n  A\n  and B\n---\n", "A and B", {}),
        ("---\ntitle: 'It''s \"A\"'   # so\n...\n", 'It\'s "A"', {}),
        ("---\ntitle: A\ntags: [x, y]\nnested: {a: 1}\n---\n", "A", {"tags": [
            "x", "y",
        ], "nested": {"a": 1}}),  # fmt: skip  # noqa: RUF028
        ("+++\ntitle = \"A\"\ndraft = false\nday = 2024-03-09\n+++\n", "A", {"draft": False, "day": "2024-03-09"}),  # noqa: E501
        ("---\nbegins: 12:30:45\nversion: 1.10\ncode: 010\nday: 2024-03-09\nzip: 01234\non: yes\n---\n", "a",  # noqa: E501
         {"begins": "12:30:45", "version": "1.10", "code": "010", "day": "2024-03-09", "zip": "01234", "on": "yes"}),  # noqa: E501
        ("---\nn: 7\nx: 0.5\nt: true\nnone: null\n---\n", "a", {"n": 7, "x": 0.5, "t": True, "none": None}),  # noqa: E501
    ],
)  # fmt: skip  # noqa: RUF028
def test_front_matter_is_metadata(matter, title, fields):
    write("a.md", matter + "Body.")
    document = one("a.md")
    assert (document.title, document.text) == (title, "Body.")
    assert document.metadata == {"source": "a.md", "format": "markdown", **fields}
    document.canonical()


@pytest.mark.parametrize(
    "text",
    [
        "---\nNote: the pier is closed\non Mondays.\n\nIt opens.\n\n---\n\nMore.",
        "---\nJust a sentence.\n---\nMore.",
        "---\n- a\n- b\n---\nMore.",
        "\n---\ntitle: late\n---\nMore.",
        "Text.\n---\ntitle: later\n---\nMore.",
        "---\na: &x [1]\nb: [*x, *x]\n---\nMore.",
        "---\n" + "[" * 5000 + "\n---\nMore.",
        "---\na: " + "[" * 100 + "]" * 100 + "\n---\nMore.",
    ],
)
def test_what_only_looks_like_front_matter_is_text(text):
    write("a.md", text)
    assert one("a.md").text == text


def test_comments_are_no_text_but_in_code():
    write("a.md", "A<!-- one\n\n# two\n-->B `<!-- c -->`\n\n```\n<!-- d -->\n```\n\nE <!-- f")
    assert one("a.md").text == "AB `<!-- c -->`\n\n```\n<!-- d -->\n```\n\nE <!-- f"
    write("b.md", "A <!-- ```\n -->\n# B\n\n<!-- x -->\n\n```\ny\n```\n<!-- z -->")
    assert "x" not in one("b.md").text
    assert "z" not in one("b.md").text


@pytest.mark.parametrize("element", ["pre", "script", "style", "textarea"])
def test_headings_in_raw_html_are_none(element):
    write("a.md", f"# A\n\n<{element}>\n# no\n\n# no\n</{element}>\n\n# B\n\ntext")
    assert [h.text for h in headings(one("a.md").text)] == ["A", "B"]


def test_headings_in_html_are_headings():
    write("a.md", '<h1 align="center">\n  <img src="x"> The crane\u00a0kit\n</h1>\n\nA\n\n## B')
    document = one("a.md")
    assert document.title == "The crane kit"
    assert [(h.level, h.text) for h in headings(document.text)] == [(1, "The crane kit"), (2, "B")]


def test_markdown_splits_at_headings():
    write("a.md", "# Guide\nHello.\n## Linux\nUse it.")
    passages = split_document(
        one("a.md"), encoder=type("E", (), {"encode": lambda s, t: t.split()})()
    )
    assert [(p.title, p.text) for p in passages] == [
        ("Guide", "Hello."),
        ("Guide > Linux", "Use it."),
    ]


# ── JSON lines ───────────────────────────────────────────────────────────────────────────────


def test_json_lines():
    lines = [
        {"text": "one"},
        {"text": "two", "title": "T", "id": "x", "metadata": {"a": [1, None], "source": "url"}},
        {"text": "three", "id": 7, "title": None, "url": "u", "metadata": None},
    ]
    write("d.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\r\n")
    documents, problems = read("d.jsonl")
    assert not problems
    assert documents == [
        Document("one", metadata={"source": "d.jsonl"}),
        Document("two", "T", "x", {"a": [1, None], "source": "url"}),
        Document("three", "", "7", {"source": "d.jsonl", "url": "u"}),
    ]


def test_json_lines_in_utf16():
    write("d.jsonl", '{"text": "ä"}\n\n{"text": "b"}'.encode("utf-16"))
    assert [d.text for d in read("d.jsonl")[0]] == ["ä", "b"]


def test_json_lists():
    write("a.jsonl", '[{"text": "one"}, {"text": "two"}]\n{"text": "three"}')
    assert [d.text for d in read("a.jsonl")[0]] == ["one", "two", "three"]
    write("b.jsonl", '[\n {"text": "one"},\n {"text": 2},\n {"text": "three"}\n]\n')
    documents, (problem,) = read("b.jsonl")
    assert [d.text for d in documents] == ["one", "three"]
    assert str(problem) == 'b.jsonl: item 2: "text" is a number, expected a string'


def test_the_text_may_be_under_another_key():
    write("a.jsonl", '{"page_content": "one two", "text": "three", "metadata": {"k": 1}}')
    (document,) = read_paths(["a.jsonl"], text_key="page_content")
    assert document == Document("one two", metadata={"source": "a.jsonl", "text": "three", "k": 1})
    write("b.jsonl", '{"page_content": "one two"}')
    assert only_problem("b.jsonl").endswith("text_key='page_content' (kvlink-rag: --text-key)")


BROKEN = {
    "{": "not JSON: Expecting property name enclosed in double quotes at column 2",
    "[1]": 'item 1: expected an object with "text", found a number',
    '"text"': 'expected an object with "text", found a string',
    "null": 'expected an object with "text", found null',
    "{}": 'no "text"; the keys are none',
    '{"contents": "x"}': "no \"text\"; the keys are 'contents'",
    '{"text": null}': '"text" is null, expected a string',
    '{"text": 3}': '"text" is a number, expected a string',
    '{"text": true}': '"text" is true or false, expected a string',
    '{"text": " "}': '"text" is empty',
    '{"text": "x", "title": []}': '"title" is a list, expected a string',
    '{"text": "x", "id": ""}': '"id" is an empty string',
    '{"text": "x", "id": true}': '"id" is true or false',
    '{"text": "x", "id": 1.5}': '"id" is a number',
    '{"text": "x", "metadata": [1]}': '"metadata" is a list, expected an object',
    '{"text": "x", "n": NaN}': "not JSON: NaN is no JSON number",
    '{"text": "x", "n": 1e999}': "not JSON",
    '{"text": "x", "n": ' + "9" * 5000 + "}": "a number has too many digits",
    '{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"text": "x", "n": ' + '{"a":' * 200 + "1" + "}" * 200 + "}": "more than 100 levels deep",
    '{"text": "x", "title": "' + "t" * 2000 + '"}': '"title" has 2000 characters',
    "\0\0\0": "not a text file",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: ascii(line)[:30])
def test_broken_lines_are_told_with_their_number_and_skipped(line):
    write("d.jsonl", '{"text": "before"}\n' + line + '\n{"text": "after"}\n')
    documents, problems = read("d.jsonl")
    texts = [d.text for d in documents]
    assert (texts[0], texts[-1]) == ("before", "after")
    assert len(texts) == 2
    for problem in problems:
        assert problem.source == "d.jsonl:2"
        assert BROKEN[line] in problem.message
        assert len(str(problem)) < 300
        assert "\n" not in str(problem)
    for document in documents:
        document.canonical()
    if problems:
        with pytest.raises(DocumentError, match=r"d\.jsonl:2: "):
            list(read_paths(["d.jsonl"]))


def test_many_broken_lines_are_counted():
    write("d.jsonl", "oops\n" * 1000 + '{"text": "x"}\n')
    documents, problems = read("d.jsonl")
    assert len(documents) == 1
    assert len(problems) == 6
    assert str(problems[-1]) == "d.jsonl: 995 more lines were skipped"


def test_lone_surrogates_are_replaced_everywhere():
    write(
        "d.jsonl", r'{"text": "a\ud800b", "title": "\udfff", "id": "\ud800", "\ud801": ["\ud802"]}'
    )
    document = one("d.jsonl")
    assert (document.text, document.title, document.id) == ("a\ufffdb", "\ufffd", "\ufffd")
    assert document.metadata == {"source": "d.jsonl", "\ufffd": ["\ufffd"]}


def test_a_line_over_the_limit_is_skipped_without_being_held():
    long = '{"text": "' + "x" * 5_000_000 + '"}\n'
    write("d.jsonl", '{"text": "a"}\n' + long + '{"text": "b"}\n')
    documents, (problem,) = read("d.jsonl", max_bytes=1000)
    assert [d.text for d in documents] == ["a", "b"]
    assert str(problem).startswith("d.jsonl:2: the line is larger than 1000 bytes")


def test_a_line_that_is_not_utf8_is_kept_with_a_warning():
    write("d.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 500 + b'\xff"}\n')
    documents, (problem,) = read("d.jsonl")
    assert [d.text for d in documents] == ["a", "x" * 500 + "\ufffd"]
    assert (problem.source, problem.skipped) == ("d.jsonl:2", False)


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────

PAGE = """<!DOCTYPE html><html><head><title> The
 page </title><style>p {}</style><script>var x = "<p>no</p>";</script></head>
<body><nav><a href=x>Home</a></nav><h1>Top &amp; more</h1><p>One <b>bold</b>
   word.<br>Next line.<!-- secret --></p><h2>Part</h2><ul><li>first<li><p>second</p></ul>
<pre>
# code
  x = 1
</pre><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<p># no heading</p><p hidden>unseen</p><noscript>off</noscript>tail</body></html>"""


def test_html_becomes_markdown_without_scripts_styles_and_navigation():
    write("p.html", PAGE)
    document = one("p.html")
    assert document.title == "Top & more"
    assert document.metadata == {"source": "p.html", "format": "markdown"}
    assert document.text == (
        "# Top & more\n\nOne bold word.\nNext line.\n\n## Part\n\n- first\n- second\n\n"
        "```\n# code\n  x = 1\n```\n\na | b\n1 | 2\n\n\\# no heading\n\ntail"
    )


@pytest.mark.parametrize(
    ("page", "title"),
    [
        ("<title>T</title><p>x", "T"),
        ("<title></title><h2>H</h2>x", "p"),
        ("just text", "p"),
        ("<h1>A<br>B</h1>x", "A B"),
    ],
)
def test_html_titles(page, title):
    write("p.html", page)
    assert one("p.html").title == title


TEXTS_OF_PAGES = {
    # numbers stay what they are
    "3&times;10<sup>9</sup> kWh in 1911<sup><a href='#n2'>2</a></sup>": "3×10^9 kWh in 1911[2]",
    "40 m<sup>3</sup> of H<sub>2</sub>O": "40 m^3 of H2O",
    "10<sup>−3</sup>m, x<sup>n+1</sup>": "10^−3 m, x^(n+1)",
    "log<sub>2</sub>8, 101<sub>2</sub>": "log_2 8, 101_2",
    "the 1<sup>st</sup> of May": "the 1st of May",
    "3<sup>1</sup>&frasl;<sub>2</sub> m, 5 km<sup>2</sup>/h": "3 1⁄2 m, 5 km^2/h",
    "The end.<sup>7</sup> So": "The end.[7] So",
    "built 1911<sup>[3]</sup>": "built 1911[3]",
    "<s>80</s>95 and <del>8</del><ins>9</ins>": "~~80~~ 95 and ~~8~~ 9",
    "<span style='text-decoration: line-through'>80</span> 95": "~~80~~ 95",
    "<del><p>Old.</p></del><p>New.</p>": "~~Old.~~\n\nNew.",
    "Tel<wbr>ephone <span>04</span><span>12</span>": "Telephone 0412",
    # rows stay rows
    "<table><tr><td>1<td>7 m<tr><td>2<td>8 m</table>": "1 | 7 m\n2 | 8 m",
    "<table><tr><th><p>A</p></th><th><div>B</div></th></tr><tr><td><ul><li>x<li>y</ul></td><td>1<br>2</td></tr></table>": "A | B\nx; y | 1 2",  # noqa: E501
    "<table><thead><tr><td>A<td>B<tbody><tr><td>1<td>2</table>": "A | B\n1 | 2",
    "<tr><td>1<td>2<tr><td>3<td>4": "1 | 2\n3 | 4",
    "<table><tr><td><h2>Part</h2><p>Text.</p></td><td><p>Side.</p></td></tr></table>": "## Part\n\nText.\n\nSide.",  # noqa: E501
    "<table><tr><td>a<table><tr><td>1<td>2</table><td>b</table>": "a\n\n1 | 2\n\nb",
    # lines stay lines
    "<pre>a<br>b</pre>": "```\na\nb\n```",
    "<pre><div>a</div><div>b</div></pre>": "```\na\nb\n```",
    "<pre><code><p>a<p>b</code></pre>": "```\na\nb\n```",
    "<span style='display:block'>7</span><span style='display:block'>8</span>": "7\n\n8",
    # lists keep their numbers
    "<ol start=3><li>a<li value=7>b<li>c</ol>": "3. a\n7. b\n8. c",
    "<ol><li>a<ol type=a><li>x<li>y</ol><li>b</ol>": "1. a\n   a. x\n   b. y\n2. b",
    "<ol type=I start=4><li>x</ol>": "IV. x",
    "<ul><li>a<ul><li>b</ul><li>c</ul>": "- a\n  - b\n- c",
    # what stands there is kept
    "<button class=accordion>When?</button><div>At six.</div>": "When?\n\nAt six.",
    "<h2><button>When?</button></h2><p>At six.": "## When?\n\nAt six.",
    "from <img src=a.png alt='pier seven'>, <img alt=''>now": "from pier seven, now",
    "if <math><mi>F</mi><mo>=</mo><mn>42</mn></math> holds": "if F = 42 holds",
    "<math><mfrac><mn>1</mn><msup><mi>x</mi><mn>2</mn></msup></mfrac></math>": "1/(x^2)",
    "<math><semantics><mn>7</mn><annotation>\\seven</annotation></semantics></math>": "7",
    "<span style='display:none'><math><mn>7</mn></math></span><img alt=7 aria-hidden=true>": "7",
    "<ruby>東京<rp>(</rp><rt>とう</rt><rp>)</rp></ruby>駅": "東京(とう)駅",
    "<select><option>S<option>M</select>": "S M",
    "<ul><li><input type=checkbox checked> done<li><input type=checkbox> open</ul>": "- [x] done\n- [ ] open",  # noqa: E501
    "<textarea>a\nb</textarea>c": "a\nb\n\nc",
    "<svg><title>icon</title><text>Low</text><text>High</text></svg>": "Low High",
    "<svg/>a<math/>b": "a b",
    "5 &lt; 6 &amp;amp; &#150; &#8364;": "5 < 6 &amp; – €",
    "<dialog>a</dialog><template>b</template>": "a",
    # what is no text is dropped
    "<h1>A<a class=headerlink href='#a'>¶</a></h1>x": "# A\n\nx",
    "<h2><a href='#a' aria-hidden=true>#</a>A</h2>x<a href='#b'>see B</a>": "## A\n\nxsee B",
    "Donau&shy;dampf\u00adschiff": "Donaudampfschiff",
    "<p>Open.<p style='display: none'>Closed.<p hidden>Closed.<p aria-hidden=true>x<p>End.": "Open.\n\nEnd.",  # noqa: E501
    "a<!-- b --><!-->c<!--->d": "acd",
    # a page is not lost for a tag that is missing or in the wrong place
    "<html><head><title>T</title><meta charset=utf-8><body><p>Text": "Text",
    "<head><title>T<body><p>Text": "Text",
    "<p>Text<!-- never closed > more": "Text more",
    "<p>Text<a href='never closed>x</a> more": "Textx more",
    "<p>Text<div": "Text<div",
    "<b><p>a</b>b</p>c": "ab\n\nc",
    "<p>a<table><tr><td>1</div><td>2</table>b": "a\n\n1 | 2\n\nb",
    "<?xml version='1.0'?><html><script src='x'/><p>Text</p></html>": "Text",
    "<nav>Home</nav>": "Home",
    "<body style='display:none'><p>Text": "Text",
    # Markdown's own signs
    "<p>&lt;!-- x<h2>A</h2>": "\\<!-- x\n\n## A",
    "<p>&lt;pre><p># b": "\\<pre>\n\n\\# b",
}  # fmt: skip


@pytest.mark.parametrize("page", TEXTS_OF_PAGES)
def test_html_keeps_what_it_says(page):
    write("p.html", page.encode())
    (document,), _ = read("p.html")
    assert document.text == TEXTS_OF_PAGES[page]


TAGS = [f"<{slash}{name}>" for slash in ("", "/") for name in (
    "p", "div", "b", "span", "ul", "li", "table", "tr", "td", "th", "h2", "a", "em", "dl", "dt",
    "dd", "section", "code", "center", "font", "sup", "pre", "button", "caption", "tbody", "ruby",
    "del", "ol", "h1", "label", "thead",
)]  # fmt: skip


def test_tags_in_any_order_lose_no_word_and_join_none():
    random = Random(5)
    for _ in range(500):
        tags = [random.choice(TAGS) for _ in range(random.randint(1, 25))]
        page = " ".join(f"{tag} w{number}" for number, tag in enumerate(tags))
        found = re.findall(r"(?<![a-z\d])w\d+(?![a-z\d])", to_markdown(page).text)
        assert sorted(found) == sorted(f"w{number}" for number in range(len(tags))), page


def test_titles_have_no_odd_spaces():
    write("p.html", "<title>T&nbsp;x</title><h1>Heading\u00a0One</h1>x")
    assert one("p.html").title == "Heading One"
    write("p.html", "<title>T&nbsp;x</title>x")
    assert one("p.html").title == "T x"


def test_the_header_of_a_long_html_table_is_repeated():
    rows = "".join(f"<tr><td>item {n}</td><td>{n} crowns</td></tr>" for n in range(60))
    write("p.html", f"<h1>P</h1><table><tr><th>Item</th><th>Price</th></tr>{rows}</table>")
    passages = split_document(
        one("p.html"), type("E", (), {"encode": lambda s, t: t.split()})(), 60
    )
    assert len(passages) > 3
    assert all(p.text.startswith("Item | Price\n--- | ---\n") for p in passages)


@pytest.mark.parametrize(
    "data",
    [
        "<p>Grüße".encode(),
        "<p>Grüße".encode("utf-16"),
        '<meta charset="iso-8859-1"><p>Grüße'.encode("latin-1"),
        b"<p>Gr\xfc\xdfe",
        '<meta charset="utf-16"><p>Grüße'.encode(),
        '<meta charset="punycode"><p>Grüße'.encode(),
        '<meta charset="nonsense"><p>Grüße'.encode(),
        b"<p>Gr&uuml;&szlig;e",
    ],
)
def test_html_encodings(data):
    write("p.htm", data)
    assert one("p.htm").text == "Grüße"


HOSTILE = [
    "<div>",
    "<",
    "<a",
    "<!--",
    "<![CDATA[",
    "<a b='",
    "&#",
    "<p>",
    "<ul><li>",
    "</",
    "<?",
    "&",
]


HOSTILE += [
    "<b>", "<sup>", "<table><tr><td>", "<ol><li>", "<h1>", "<math><mrow>", "<del>x", "<pre>", "</p>",  # noqa: E501
    "<b id=%d><p>", "<span hidden>", "<ruby><rt>", "<a href='#'>", "<svg>", "<![CDATA[x]]>", "<title>",  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("tail", ["", ">"])
def test_hostile_html_takes_linear_work(unit, tail):
    """Four times the page takes at most about four times the calls; quadratic would be 16."""

    def work(size: int) -> int:
        units = range(size // len(unit))
        page = "".join(unit.replace("%d", str(n)) for n in units) + tail
        return calls_of(lambda: to_markdown(page))

    work(100)
    assert work(40_000) < 5 * work(10_000) + 5_000


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_html_holds_little(unit):
    """Elements without end: what is remembered of them does not grow with the page."""
    page = unit * (60_000 // len(unit))
    tracemalloc.start()
    to_markdown(page)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 + 10 * len(page)


def test_more_tags_than_a_page_can_have():
    write("p.html", "<b>" * 1_600_000)
    assert only_problem("p.html") == "p.html: more than 1,500,000 tags in one page; split it"


# ── PDF ──────────────────────────────────────────────────────────────────────────────────────


def pdf(*pages: str, title: str = "") -> bytes:
    """A PDF written by hand: one line of Helvetica a page."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, io.SEEK_END)
    for number, content in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1"))
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010d} 00000 n \n" for place in places).encode())
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    out.write(f"trailer\n{trailer}\nstartxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def drawn(*strings: tuple[int, int, str]) -> bytes:
    """A PDF of one page: each string at its place (x, y), drawn in this order."""
    moves = (f"1 0 0 1 {x} {y} Tm ({text}) Tj" for x, y, text in strings)
    return pdf(") Tj ET BT /F1 10 Tf " + " ".join(moves) + " (")


LEFT = [
    "The lighthouse was lit in",
    "autumn by a keeper who",
    "came from Vrana. He had",
    "no lamp of his own.",
]
RIGHT = [
    "Bread was sold here from",
    "the year 1921 on, by the",
    "widow Moe, who had the",
    "shop from her father.",
]


@pytest.mark.parametrize("apart", [True, False])
def test_columns_are_read_one_after_the_other(apart):
    """Drawn line by line over the page, or column by column."""
    rows = [(72, 700 - 12 * i, text) for i, text in enumerate(LEFT)]
    others = [(320, 700 - 12 * i, text) for i, text in enumerate(RIGHT)]
    mixed = [each for pair in zip(rows, others, strict=True) for each in pair]
    ends = [(72, 600, "A last line that goes over the whole page, from side to side of it.")]
    first = [(72, 730, "A heading over both of the columns of this page, a long one.")]
    write("f.pdf", drawn(*first, *(rows + others if apart else mixed), *ends))
    text = one("f.pdf").text
    assert " ".join(text.split()) == " ".join([first[0][2], *LEFT, *RIGHT, ends[0][2]])


def test_rows_of_a_table_stay_together():
    rows = [("Ferry to Vrana", "12 crowns a day"), ("Ferry to Orvale", "15 crowns a day")] * 3
    cells = [
        (x, 700 - 12 * i, text)
        for i, row in enumerate(rows)
        for x, text in zip((72, 320), row, strict=True)
    ]
    write("f.pdf", drawn(*cells))
    lines = [" ".join(line.split()) for line in one("f.pdf").text.splitlines()]
    assert lines == [" ".join(row) for row in rows]


BUILT_IN = "بني الميناء سنة ١٩١١."
ERECTED = "המגדלור של העיר הוקם בקיץ."


@pytest.mark.parametrize("text", [BUILT_IN, ERECTED])
def test_lines_from_right_to_left_are_turned_where_they_stand_backwards(text):
    assert turned(text) == text
    assert turned(text[::-1]) == text
    assert turned(f"Port 1911\n{text[::-1]}\n") == f"Port 1911\n{text}\n"
    assert turned("Only Latin letters.") == "Only Latin letters."


def test_pdf_pages():
    write("f.pdf", pdf("First page.", "", "Third page.", title="A report"))
    documents, problems = read("f.pdf")
    assert not problems
    assert [(d.text, d.title, d.metadata["page"]) for d in documents] == [
        ("First page.", "A report", 1),
        ("Third page.", "A report", 3),
    ]


@pytest.mark.parametrize("title", ["", "untitled", "Microsoft Word - x", "paper.tex"])
def test_pdf_titles_that_are_none(title):
    write("f.pdf", pdf("x", title=title))
    assert one("f.pdf").title == "f"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as PDF"),
        (b"not a pdf", "cannot be read as PDF"),
        (b"%PDF-1.4\n" + random.Random(0).randbytes(1000), "cannot be read as PDF"),
        (pdf("x")[:200], "cannot be read as PDF"),
        (pdf("", ""), "no text in this PDF; a scanned one needs OCR first"),
    ],
)
def test_broken_pdfs(data, message):
    write("f.pdf", data)
    write("g.txt", "good")
    documents, (problem,) = read("f.pdf", "g.txt")
    assert [d.text for d in documents] == ["good"]
    assert message in str(problem)
    assert "\n" not in str(problem)


def test_damaged_pdfs_give_text_or_one_problem():
    """Bytes flipped at random places, from a fixed seed: never an exception, never nothing."""
    random = Random(0)
    whole = pdf("First page.", "Second page.")
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        write("f.pdf", bytes(damaged))
        documents, problems = read("f.pdf")
        assert documents or problems
        assert not any("\n" in str(problem) for problem in problems)


def test_a_pdf_with_a_password():
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("secret")))
    writer.encrypt("word", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    write("f.pdf", buffer.getvalue())
    assert "needs a password" in only_problem("f.pdf")


def test_a_missing_package_is_told_before_anything_is_read(monkeypatch):
    write("0.txt", "x")
    write("a.pdf", "x")
    monkeypatch.setattr("kvlink_rag.ingest.readers.pdf.find_spec", lambda *_: None)
    install = r"pip install 'kvlink-rag\[pdf\]'"
    for paths in (["a.pdf"], [".", "a.pdf"]):
        with pytest.raises(MissingExtra, match=install):
            next(read_paths(paths))
    documents, (problem,) = read(".")
    assert [d.text for d in documents] == ["x"]
    assert problem.skipped
    assert re.match(rf"a\.pdf: 1 file is left out: .*{install}", str(problem))
    Path("0.txt").unlink()
    with pytest.raises(MissingExtra, match=install):
        next(read_paths(["."]))


def test_pages_without_text_that_draw_are_named():
    drawn = pdf("Text.", "", "", "More.").replace(
        b"<< /Length 0 >>\nstream\n\n", b"<< /Length 9 >>\nstream\n0 0 9 9 re f\n"
    )
    write("f.pdf", drawn)
    documents, (problem,) = read("f.pdf")
    assert [d.text for d in documents] == ["Text.", "More."]
    assert not problem.skipped
    assert "no text on pages 2-3, only pictures" in str(problem)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("The adminis-\ntration of it", "The administration of it"),
        ("a well-known and well-\nknown man", "a well-known and well-known man"),
        ("from 1874-\n1902, T-\nshirt, Anglo-\nSaxon", "from 1874-\n1902, T-\nshirt, Anglo-\nSaxon"),  # noqa: E501
        ("o\ufb03ce, \ufb01nd, \ufb02oor", "office, find, floor"),
        ("soft\u00ad\nware", "software"),
    ],
)  # fmt: skip
def test_pdf_words_are_mended(raw, text):
    assert _mended(raw) == text


def test_an_encrypted_pdf_that_all_may_read():
    pypdf = pytest.importorskip("pypdf")
    pytest.importorskip("cryptography")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("open to all")))
    writer.encrypt("", "owner", algorithm="AES-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    write("f.pdf", buffer.getvalue())
    assert one("f.pdf").text == "open to all"


def test_small_pdfs_with_much_work_are_bounded():
    """Work is counted for a file as a whole: many pages of one stream, one stream many times."""
    pages = pdf(*["x"] * 3000)
    small = re.sub(rb"/Contents \d+ 0 R", b"/Contents 5 0 R", pages)
    budget = _Budget(20_000)
    read_pages = 0
    with contextlib.suppress(_TooMuchWork):
        for number in range(3000):
            _page(_open(small), number, budget)
            read_pages += 1
    assert 0 < read_pages < 40
    packed = zlib.compress(b"BT (a) Tj ET " * 400_000)
    stream = b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b" % (len(packed), packed)
    bomb = pdf("x").replace(b"/Contents 5 0 R", b"/Contents [5 0 R 5 0 R 5 0 R]")
    bomb = re.sub(rb"<< /Length \d+ >>\nstream\n[^\n]*", lambda _: stream, bomb)
    write("f.pdf", bomb)
    documents, problems = read("f.pdf")
    assert not documents
    assert "page 1: far too much work for a file of its size" in str(problems[0])
