"""Which file a passage is from, over runs: one identity for a file, and its text's fate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.errors import DocumentNotFound
from kvlink_rag.ingest.index_files import IngestReport, gone, ingest, remove
from kvlink_rag.ingest.readers import find
from kvlink_rag.ingest.sources import FILE_KEY, matching


@pytest.fixture
def rag(make_model: ModelMaker, tmp_path: Path, monkeypatch: Any) -> Iterator[KVLinkRAG]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = make_model("llama", torch.float32)
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=WordEmbedder()) as rag:
        yield rag
        assert rag.check() == []


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def index(rag: KVLinkRAG, *paths: str, **options: Any) -> tuple[IngestReport, list[str]]:
    said: list[str] = []
    files = find(paths, lambda problem: said.append(str(problem)))
    report = ingest(rag, files, on_problem=lambda p: said.append(str(p)), roots=paths, **options)
    return report, said


def texts(rag: KVLinkRAG) -> list[str]:
    return sorted(document.text for document in rag.documents())


class Narrow(WordEmbedder):
    """Reads 16 words of a text, and says so."""

    window = 16

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]


@pytest.mark.parametrize("most", [60, 200, 1000])
def test_passages_fit_model_and_embedder(
    make_model: ModelMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    """A byte is a token of the model, a word one of the embedder."""
    said = " ".join(f"Town {n} has a harbour." if n % 3 else f"O{'h' * n}!" for n in range(60))
    path = write(str(tmp_path / "a.txt"), said)
    model, embedder = make_model("llama", torch.float32), Narrow()
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        index(rag, path, max_tokens=most)
        passages = [document.text for document in rag.documents()]
    assert " ".join(passages).split() == said.split()
    assert max(len(text) for text in passages) <= most
    assert max(len(text.split()) for text in passages) <= 14  # two are left to the title
    full = [text for text in passages if len(text) > most // 2 or len(text.split()) > 6]
    assert len(full) >= len(passages) - 1
    assert "window" not in caplog.text


def counts(report: IngestReport) -> tuple[int, int, int, int]:
    return report.added, report.replaced, report.unchanged, report.removed


def test_one_file_by_many_spellings_is_one(rag: KVLinkRAG, monkeypatch: Any) -> None:
    write("docs/a.txt", "The crane of Orvale.")
    os.symlink("docs", "link")
    assert counts(index(rag, "docs")[0]) == (1, 0, 0, 0)
    for path in ("./docs/a.txt", str(Path("docs").resolve()), "docs/../docs", "link"):
        assert counts(index(rag, path)[0]) == (0, 0, 1, 0)
    monkeypatch.chdir("docs")
    assert counts(index(rag, ".")[0]) == (0, 0, 1, 0)
    assert gone(rag, ["."]) == []
    (document,) = rag.documents()
    assert document.metadata["source"] == "docs/a.txt"


def test_two_files_of_one_name_are_two(rag: KVLinkRAG, monkeypatch: Any) -> None:
    here = Path.cwd()
    for folder in ("one", "two"):
        write(f"{folder}/README.md", f"The mill of {folder}.")
    for folder in ("one", "two"):
        monkeypatch.chdir(here / folder)
        assert counts(index(rag, "README.md")[0]) == (1, 0, 0, 0)
    assert texts(rag) == ["The mill of one.", "The mill of two."]
    Path("README.md").write_text("The mill is gone.")
    assert counts(index(rag, "README.md")[0]) == (1, 0, 0, 1)
    assert texts(rag) == ["The mill is gone.", "The mill of one."]


def test_an_applications_own_documents_stay(rag: KVLinkRAG) -> None:
    path = write("a.txt", "The crane of Orvale.")
    rag.add([Document("Mine.", metadata={"source": path}), Document("Own.", id="m1")])
    index(rag, path)
    write("w.jsonl", '{"id": "m1", "text": "Theirs."}')
    report, said = index(rag, "w.jsonl")
    assert report.skipped == 1
    assert "w.jsonl: id 'm1' stands for another text in an application" in said[0]
    assert texts(rag) == ["Mine.", "Own.", "The crane of Orvale."]
    Path(path).unlink()
    index(rag, ".", sync=True)
    assert texts(rag) == ["Mine.", "Own."]


def test_lines_with_a_source_belong_to_their_file(rag: KVLinkRAG) -> None:
    line = '{"text": "It costs %d crowns.", "metadata": {"source": "https://ex.org/f"}}'
    write("w.jsonl", line % 12)
    index(rag, "w.jsonl")
    write("w.jsonl", line % 15)
    assert counts(index(rag, "w.jsonl")[0]) == (1, 0, 0, 1)
    (document,) = rag.documents()
    assert document.metadata["source"] == "https://ex.org/f"
    assert set(matching(rag, "w.jsonl")) == set(matching(rag, "https://ex.org/f")) == {document.id}
    write("w.jsonl", "")
    assert counts(index(rag, "w.jsonl")[0]) == (0, 0, 0, 1)


def test_a_bad_line_keeps_the_old_passages_and_says_so(rag: KVLinkRAG) -> None:
    write("w.jsonl", '{"text": "One."}\n{"text": "Two."}')
    index(rag, "w.jsonl")
    write("w.jsonl", '{"text": "One."}\nbroken')
    report, said = index(rag, "w.jsonl")
    assert counts(report) == (0, 0, 1, 0)
    assert "w.jsonl: kept 1 passage of before" in said[-1]
    write("w.jsonl", '{"text": "One."}')
    assert counts(index(rag, "w.jsonl")[0]) == (0, 0, 1, 1)


def test_one_id_in_two_files_is_told_in_every_run(rag: KVLinkRAG) -> None:
    write("a.jsonl", '{"id": "x", "text": "One."}')
    write("b.jsonl", '{"id": "x", "text": "Two."}')
    for paths in (["a.jsonl", "b.jsonl"], ["b.jsonl"], ["."], ["b.jsonl"]):
        report, said = index(rag, *paths)
        assert report.skipped == 1
        assert any("id 'x' stands for another text in a.jsonl" in line for line in said)
        assert texts(rag) == ["One."]


def test_a_passage_of_two_files_stays_as_long_as_one_holds_it(rag: KVLinkRAG) -> None:
    write("a.jsonl", '{"id": "x", "text": "Shared."}\n{"id": "y", "text": "Mine."}')
    write("b.jsonl", '{"id": "x", "text": "Shared."}')
    index(rag, "a.jsonl")
    index(rag, "b.jsonl")
    assert counts(index(rag, "a.jsonl", "b.jsonl")[0]) == (0, 0, 2, 0)
    assert counts(index(rag, "a.jsonl")[0]) == (0, 0, 2, 0)
    write("a.jsonl", '{"id": "y", "text": "Mine."}')
    assert index(rag, "a.jsonl")[0].removed == 0
    assert texts(rag) == ["Mine.", "Shared."]
    (shared,) = rag.get(["x"])
    assert [Path(file).name for file in shared.metadata[FILE_KEY]] == ["b.jsonl"]
    write("b.jsonl", "")
    assert index(rag, "b.jsonl")[0].removed == 1
    assert texts(rag) == ["Mine."]


def test_an_emptied_folder_is_seen(rag: KVLinkRAG) -> None:
    path = write("docs/a.txt", "The crane.")
    index(rag, "docs")
    Path(path).unlink()
    report, _ = index(rag, "docs")
    assert (report.gone, report.removed, texts(rag)) == (["docs/a.txt"], 0, ["The crane."])
    report, _ = index(rag, "docs", sync=True, dry_run=True)
    assert (report.gone, report.removed, texts(rag)) == (["docs/a.txt"], 1, ["The crane."])
    report, _ = index(rag, "docs", sync=True)
    assert (report.gone, report.removed, texts(rag)) == (["docs/a.txt"], 1, [])


def test_a_folder_that_moved_is_noticed(rag: KVLinkRAG) -> None:
    write("old/a.txt", "The crane.")
    write("other/b.txt", "The mill.")
    index(rag, "old", "other")
    os.rename("old", "new")
    Path("other/b.txt").unlink()
    report, said = index(rag, "new")
    assert report.moved == [("old/a.txt", "new/a.txt")]
    assert "old/a.txt: moved to new/a.txt" in said[-1]
    assert texts(rag) == ["The crane.", "The crane.", "The mill."]
    report, _ = index(rag, "new", sync=True)
    assert (report.encoded, report.removed) == (0, 1)
    assert texts(rag) == ["The crane.", "The mill."]  # the other folder was not asked about
    assert gone(rag, ["."]) == ["other/b.txt"]


def test_a_dry_run_changes_nothing(rag: KVLinkRAG) -> None:
    write("a.jsonl", '{"id": "x", "text": "One."}\n{"id": "y", "text": "Two."}')
    index(rag, "a.jsonl")
    write("a.jsonl", '{"id": "x", "text": "Uno."}\n{"id": "z", "text": "Three."}')
    before = list(rag.documents())
    planned, _ = index(rag, "a.jsonl", dry_run=True)
    assert list(rag.documents()) == before
    done, _ = index(rag, "a.jsonl")
    assert counts(planned) == counts(done) == (1, 1, 0, 1)


def test_sources_may_be_files_folders_and_patterns(rag: KVLinkRAG, monkeypatch: Any) -> None:
    for name in ("docs/a.md", "docs/b.txt", "docs/sub/c.md", "docs2/d.md"):
        write(name, f"Text of {name}.")
    index(rag, ".")

    def found(*wanted: str) -> list[str]:
        ids = {id for each in wanted for id in matching(rag, each)}
        return sorted(d.metadata["source"] for d in rag.get(ids))

    assert found("docs") == found("./docs/") == ["docs/a.md", "docs/b.txt", "docs/sub/c.md"]
    assert found("docs/b.txt") == ["docs/b.txt"]
    assert found("docs*/*.md") == ["docs/a.md", "docs/sub/c.md", "docs2/d.md"]
    assert found("nothing") == found("docs/*.pdf") == []
    monkeypatch.chdir("docs2")
    assert found("../docs/sub", "d.md") == ["docs/sub/c.md", "docs2/d.md"]


def test_what_another_file_holds_stays_when_a_file_is_deleted(rag: KVLinkRAG) -> None:
    both = '{"id": "x", "text": "Of both."}'
    write("a.jsonl", both + '\n{"id": "y", "text": "Of one."}')
    write("sub/b.jsonl", both)
    write("c.jsonl", '{"id": "z", "text": "Of none of them."}')
    index(rag, ".")
    with pytest.raises(DocumentNotFound, match=r"'no\.md'"):
        remove(rag, ["a.jsonl", "no.md"])
    assert remove(rag, ["a.jsonl"]) == (1, 1)
    assert texts(rag) == ["Of both.", "Of none of them."]
    assert list(matching(rag, "sub/b.jsonl")) == ["x"]
    assert matching(rag, "a.jsonl") == {}
    (kept,) = rag.get(["x"])
    assert kept.metadata["source"] == "sub/b.jsonl"
    index(rag, "a.jsonl")
    assert remove(rag, ["a.jsonl", "sub"], ids=["z"]) == (3, 0)
    assert texts(rag) == []


def test_a_collection_of_before_is_brought_up_to_date(rag: KVLinkRAG) -> None:
    """As readers wrote it then: the path as typed, and no other sign of the file."""
    for name, text in (("a.txt", "New."), ("b.md", "Same."), ("c.txt", "C.")):
        write(name, text)
    write("d.jsonl", '{"text": "Line.", "source": "https://ex.org"}')
    rag.add(
        [
            Document("Old.", "a", metadata={"source": "a.txt"}),
            Document("Same.", "b", metadata={"source": "b.md", "format": "markdown"}),
            Document("C.", "c", metadata={"source": "c.txt"}),
            Document("Line.", metadata={"source": "https://ex.org"}),
        ]
    )
    report, _ = index(rag, "a.txt", "b.md", "d.jsonl")
    assert (report.removed, report.encoded) == (3, 1)
    assert texts(rag) == ["C.", "Line.", "New.", "Same."]
    assert counts(index(rag, ".")[0]) == (1, 0, 3, 1)
    assert all(FILE_KEY in document.metadata for document in rag.documents())
