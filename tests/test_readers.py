"""Readers: every kind of file, and what hostile or broken ones give."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from kvlink_rag.documents import Document
from kvlink_rag.errors import DocumentError, MissingExtra
from kvlink_rag.ingest.readers import Problem, read_paths
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
    for name in ("b/z.txt", "b/A.TXT", "a.txt", "c.md", ".hidden/x.txt", "b/.x.txt", "b/x.py"):
        write(f"docs/{name}", "some text")
    documents, problems = read("docs")
    assert [d.metadata["source"] for d in documents] == [
        "docs/a.txt",
        "docs/b/A.TXT",
        "docs/b/z.txt",
        "docs/c.md",
    ]
    assert not problems


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
        (lambda: write("a.py", "x"), "a.py", "not a file of a known kind; known are .txt, .md,"),
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
    write("a.txt", b"caf\xe9")
    assert [d.text for d in read_paths(["a.txt"])] == ["caf\ufffd"]
    assert "a.txt: not UTF-8 at byte 3" in caplog.text


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


@pytest.mark.parametrize("data", [b"caf\xe9 ok", b"ok \xed\xa0\x80", b"\xff\xfea\x00\x00\xd8"])
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
    write(name, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)))
    assert "not a text file" in only_problem(name)


def test_a_name_that_is_no_unicode():
    Path(os.fsdecode(b"caf\xe9.txt")).write_text("x")
    document = one(".")
    assert (document.title, document.metadata) == ("caf\ufffd", {"source": "caf\ufffd.txt"})


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


BROKEN = {
    "{": "not JSON: Expecting property name enclosed in double quotes at column 2",
    "[1]": 'expected an object with "text", found a list',
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
    '{"text": "x", "n": ' + '{"a":' * 900 + "1" + "}" * 900 + "}": "",
    '{"text": "x", "title": "' + "t" * 2000 + '"}': '"title" has 2000 characters',
    "\0\0\0": "not a text file",
}


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: ascii(line)[:30])
def test_broken_lines_are_told_with_their_number_and_skipped(line):
    write("d.jsonl", '{"text": "before"}\n' + line + '\n{"text": "after"}\n')
    documents, problems = read("d.jsonl")
    texts = [d.text for d in documents]
    assert (texts[0], texts[-1]) == ("before", "after")
    if BROKEN[line]:
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
    write("d.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    documents, (problem,) = read("d.jsonl")
    assert [d.text for d in documents] == ["a", "caf\ufffd"]
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


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("tail", ["", ">"])
def test_hostile_html_takes_bounded_time(unit, tail):
    write("p.html", unit * (40_000 // len(unit)) + tail)
    start = time.perf_counter()
    documents, problems = read("p.html")
    assert time.perf_counter() - start < 10  # the quadratic ones took minutes
    assert len(documents) + len(problems) == 1


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
        (b"%PDF-1.4\n" + os.urandom(1000), "cannot be read as PDF"),
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


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [("a.pdf", "pypdf", "kvlink-rag[pdf]"), ("a.html", "bs4", "kvlink-rag[html]")],
)
def test_a_missing_package_is_told_before_anything_is_read(name, module, line, monkeypatch):
    write("0.txt", "x")
    write(name, "x")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(MissingExtra, match=r"pip install '" + line.replace("[", r"\[")):
        next(read_paths(["."]))
