"""Encoding on many machines, into the tier that they share with a collection."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, PassageWriter
from kvlink_rag.collection.passage_writer import PATIENCE
from kvlink_rag.collection.passages import FETCHED
from kvlink_rag.errors import ConfigError, DocumentError, PassageTooLong, StorageError
from kvlink_rag.snapshots.remote import RemoteTier
from kvlink_rag.snapshots.remote.places import Folder

SECRET = "0123456789abcdef" * 4
ROWS = [
    {"title": f"Town {n}", "text": f"The harbour of town {n} was built in 19{n:02} by its people."}
    for n in range(8)
]
DOCUMENTS = [Document(row["text"], title=row["title"]) for row in ROWS]
QUESTION = "Which harbour was built in 1905?"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLINK_REMOTE_SECRET", SECRET)


@pytest.fixture
def model(make_model: ModelMaker) -> KVLinkModel:
    return make_model("llama", torch.float32)


@pytest.fixture
def writer(model: KVLinkModel, url: str) -> Iterator[PassageWriter]:
    made = PassageWriter(remote=url, model=model)
    yield made
    made.close()


def columns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [row[name] for row in rows] for name in ("title", "text")}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_collection_finds_what_was_written(
    tmp_path: Path, model: KVLinkModel, writer: PassageWriter, url: str, folder: Path
) -> None:
    """In batches, by two writers: it encodes nothing, and answers as if it had."""
    first = writer(columns(ROWS[:5]))
    second = PassageWriter(remote=url, model=model)(columns(ROWS[3:]))
    assert first["encoded"] == [True] * 5
    assert second["encoded"] == [False, False, True, True, True]
    assert first["key"][3:] == second["key"][:2]
    assert len(files(folder)) == 8
    with (
        KVLinkRAG.open(tmp_path / "a", model=model, embedder=WordEmbedder(), remote=url) as rag,
        KVLinkRAG.open(tmp_path / "b", model=model, embedder=WordEmbedder(), remote="") as alone,
    ):
        report = rag.add(DOCUMENTS)
        assert (report.added, report.encoded) == (8, 0)
        assert alone.add(DOCUMENTS).encoded == 8
        answers = [each.ask(QUESTION, max_new_tokens=8) for each in (rag, alone)]
        assert answers[0].text == answers[1].text
        assert answers[0].trace.snapshots_encoded == 0
        assert rag.verify(QUESTION, k=4).holds
        assert rag.check() == []


def test_the_codec_is_the_collections(
    tmp_path: Path, model: KVLinkModel, url: str, folder: Path
) -> None:
    PassageWriter(remote=url, model=model, codec="int8")(columns(ROWS))
    with KVLinkRAG.open(
        tmp_path / "a", model=model, embedder=WordEmbedder(), remote=url, codec="int8"
    ) as rag:
        assert rag.add(DOCUMENTS).encoded == 0
    with KVLinkRAG.open(
        tmp_path / "b", model=model, embedder=WordEmbedder(), remote=url, codec="exact"
    ) as rag:
        assert rag.add(DOCUMENTS).encoded == 8


def test_nothing_stays_on_the_machine_that_wrote(
    model: KVLinkModel, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    writer = PassageWriter(remote=url, model=model)
    keys = writer(columns(ROWS))["key"]
    names = [path.name for path in files(tmp_path / "scratch")]
    assert not [name for name in names if name.startswith(tuple(keys))]
    assert names
    del writer
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_tier_that_fails_is_an_error_and_the_batch_goes_on_later(
    writer: PassageWriter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is written when the call returns, or it raises: who calls tries again."""
    put, left = Folder.put, [3]

    def full(place: Folder, name: str, value: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("no space left")
        put(place, name, value)

    monkeypatch.setattr(Folder, "put", full)
    with pytest.raises(OSError, match="no space"):
        writer(columns(ROWS))
    assert len(files(folder)) == 3
    monkeypatch.setattr(Folder, "put", put)
    assert sum(writer(columns(ROWS))["encoded"]) == 5
    assert len(files(folder)) == 8


def test_rows_that_are_the_same_are_encoded_once(writer: PassageWriter) -> None:
    given = writer(columns([ROWS[0], ROWS[1], ROWS[0]]))
    assert given["encoded"] == [True, True, False]
    assert given["key"][0] == given["key"][2] != given["key"][1]
    assert given["tokens"][0] == given["tokens"][2] > 10
    assert writer({"text": []}) == {"key": [], "tokens": [], "encoded": []}
    assert writer({"text": ["No title."]})["encoded"] == [True]


def test_missing_titles_are_none_and_missing_texts_an_error(
    tmp_path: Path, model: KVLinkModel, writer: PassageWriter, url: str, folder: Path
) -> None:
    """As Ray and pandas give them: None, NaN and NA, in arrays of objects."""
    titles = ["T", None, float("nan"), type("NAType", (), {})()]
    texts = [f"The mill of town {n} stands at its river." for n in range(4)]
    writer({"text": np.array(texts, object), "title": np.array(titles, object)})
    documents = [Document(t, title="T" if n == 0 else "") for n, t in enumerate(texts)]
    with KVLinkRAG.open(tmp_path / "a", model=model, embedder=WordEmbedder(), remote=url) as rag:
        assert rag.add(documents).encoded == 0
    for bad in (None, float("nan"), b"abc", ["a"], 3):
        with pytest.raises(DocumentError, match="the text of row 1 is a"):
            writer({"text": ["fine", bad]})
    with pytest.raises(DocumentError, match="the title of row 0 is a bytes"):
        writer({"text": ["fine"], "title": [b"x"]})
    with pytest.raises(DocumentError, match="a lone surrogate"):
        writer({"text": ["half \ud83d of it"]})
    with pytest.raises(DocumentError, match="found 2 titles for 1 texts"):
        writer({"text": ["fine"], "title": ["a", "b"]})
    named = PassageWriter(remote=url, model=model, title="titel")
    with pytest.raises(DocumentError, match="found no column 'titel'"):
        named({"text": ["fine"], "title": ["a"]})


def test_a_batch_is_read_in_parts(
    model: KVLinkModel, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is tried again encodes nothing, however many rows it has: each part has its
    own time."""
    rows = [{"title": "", "text": f"Passage {n} of many."} for n in range(20)]
    PassageWriter(remote=url, model=model)(columns(rows))
    asked: list[int] = []
    fetch = RemoteTier.fetch
    monkeypatch.setattr(
        RemoteTier, "fetch", lambda tier, keys: (asked.append(len(keys)), fetch(tier, keys))[1]
    )
    again = PassageWriter(remote=url, model=model)
    assert not any(again(columns(rows))["encoded"])
    assert (sum(asked), max(asked)) == (20, FETCHED)
    assert again._tier._timeout == PATIENCE
    assert PassageWriter(remote=f"{url}&timeout=3", model=model)._tier._timeout == 3


def test_a_snapshot_that_is_gone_is_not_said_to_be_written(
    writer: PassageWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer._tier, "_read", lambda key: None)
    with pytest.raises(StorageError, match="holds no snapshot"):
        writer(columns(ROWS[:1]))


def test_threads_take_turns(writer: PassageWriter, folder: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        given = list(pool.map(lambda _: writer(columns(ROWS)), range(3)))
    assert sum(sum(each["encoded"]) for each in given) == len(files(folder)) == 8


def test_a_constructor_that_fails_and_a_forked_child_leave_the_folders_right(
    model: KVLinkModel, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for bad in ({"remote": "file:///nope?namespace=a"}, {"remote": url, "codec": "int7"}):
        with pytest.raises(ConfigError):
            PassageWriter(model=model, **bad)
    assert list(scratch.iterdir()) == []
    writer = PassageWriter(remote=url, model=model)
    if (child := os.fork()) == 0:
        writer.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert writer(columns(ROWS[:1]))["encoded"] == [True]


def test_what_it_cannot_take(writer: PassageWriter, model: KVLinkModel, folder: Path) -> None:
    with pytest.raises(DocumentError, match="found no column 'text', but body"):
        writer({"body": ["x"]})
    with pytest.raises(DocumentError, match="has no text"):
        writer({"text": ["fine", "  "]})
    with pytest.raises(PassageTooLong, match="split it"):
        writer({"text": ["fine", "long " * 5000]})
    assert files(folder) == []
    with pytest.raises(ConfigError, match="add \\?namespace=NAME"):
        PassageWriter(remote=f"file://{folder}", model=model)
    with pytest.raises(ConfigError, match="codec"):
        PassageWriter(remote=f"file://{folder}?namespace=a", model=model, codec="int7")


def work(directory: str, url: str, rows: list[dict[str, str]]) -> int:
    """What a process elsewhere does: load the model by its name, write its share."""
    torch.set_num_threads(1)
    return sum(PassageWriter(remote=url, model=directory, device="cpu")(columns(rows))["encoded"])


def test_processes_share_the_work(
    tmp_path: Path, saved_pair: tuple[Path, Path], url: str, folder: Path
) -> None:
    directory = str(saved_pair[0])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        shares = [(directory, url, ROWS[:4]), (directory, url, ROWS[4:])]
        assert pool.starmap(work, shares) == [4, 4]
    with KVLinkRAG.open(
        tmp_path / "a", model=directory, embedder=WordEmbedder(), remote=url
    ) as rag:
        assert rag.add(DOCUMENTS).encoded == 0


@pytest.mark.filterwarnings("ignore")  # Ray's own, of its settings
def test_ray_data_takes_it(
    tmp_path: Path, saved_pair: tuple[Path, Path], url: str, folder: Path
) -> None:
    """Two actors of a local Ray, as its `map_batches` makes them."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'ray[data]')")
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    ray.data.DataContext.get_current().actor_task_retry_on_errors = True
    ray.init(num_cpus=4, include_dashboard=False)  # two for the actors, two for what feeds them
    try:
        arguments: dict[str, Any] = {"remote": url, "model": str(saved_pair[0]), "device": "cpu"}
        written = (
            ray.data.from_items(ROWS)
            .repartition(4)
            .map_batches(
                PassageWriter,
                fn_constructor_kwargs=arguments,
                compute=ray.data.ActorPoolStrategy(size=2),
                batch_size=2,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    assert sum(bool(row["encoded"]) for row in written) == 8
    assert len(files(folder)) == 8
    with KVLinkRAG.open(
        tmp_path / "a", model=str(saved_pair[0]), embedder=WordEmbedder(), remote=url
    ) as rag:
        assert rag.add(DOCUMENTS).encoded == 0
