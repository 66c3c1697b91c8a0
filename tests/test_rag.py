"""A collection's life: add, ask, update, delete, reopen, interrupt, mend, other models."""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelMaker, WordEmbedder, byte_tokenizer, random_model

import kvlink_rag.collection.adding
import kvlink_rag.retrieval.vector_index
from kvlink_rag import Document, Hit, KVLinkModel, KVLinkRAG, Passage, PromptPreset
from kvlink_rag.collection.conversation import Conversation
from kvlink_rag.documents import MAX_DEPTH, as_json, jsonable
from kvlink_rag.errors import (
    CatalogError,
    ConfigError,
    DocumentError,
    DocumentNotFound,
    PassageTooLong,
    PromptError,
    SettingsMismatch,
)
from kvlink_rag.retrieval.rounds import in_order
from kvlink_rag.snapshots.codecs import in_codec

TOWNS = ["Orvale", "Marnik", "Teldon", "Brisk", "Quill", "Sarno", "Velt", "Hux"]


def towns(count: int = len(TOWNS), said: str = "has a harbour") -> list[Document]:
    return [Document(f"The town of {t} {said}.", title=t, id=t.lower()) for t in TOWNS[:count]]


@pytest.fixture
def model(make_model: ModelMaker) -> KVLinkModel:
    return make_model("llama", torch.float32)


@pytest.fixture
def rag(tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder) -> KVLinkRAG:
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        yield rag
        assert rag.check() == []


def answers_equal_oracle(rag: KVLinkRAG, question: str, k: int = 4) -> bool:
    """Whether the answer from snapshots is the one of a masked full prefill of the same prompt."""
    answer = rag.ask(question, k=k, max_new_tokens=12)
    parts = rag.model.prompt([hit.document for hit in answer.hits], question)
    return answer.text == rag.model.generate(parts, mode="masked", max_new_tokens=12)


def test_add_and_ask(rag: KVLinkRAG) -> None:
    report = rag.add(towns())
    assert (report.added, report.encoded, len(rag)) == (8, 8, 8)
    answer = rag.ask("Which town is Marnik?", k=3, max_new_tokens=12)
    assert answer.hits[0].document.id == "marnik"
    assert answer.hits[0].score >= answer.hits[1].score
    trace = answer.trace
    assert (trace.passages, trace.snapshots_found, trace.snapshots_encoded) == (3, 3, 0)
    assert trace.reused_tokens > 0
    assert trace.computed_tokens > 0
    assert trace.generated_tokens == 12
    stages = (trace.retrieval_ms, trace.read_ms, trace.assembly_ms, trace.prefill_ms)
    assert all(stage > 0 for stage in stages)
    assert sum(stages) <= trace.first_token_ms <= trace.total_ms
    assert answers_equal_oracle(rag, "Which town is Marnik?")


RENDERED = {
    "passage_template": "{title} - {text}\n",
    "untitled_template": "- {text}\n",
    "rank": "exact",
}


@pytest.mark.parametrize("field", RENDERED)
def test_other_rendered_passages_are_another_collections(
    tmp_path: Path, embedder: WordEmbedder, model: KVLinkModel, field: str
) -> None:
    """Snapshots hold the rendered text, so they fit one way to render it."""
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        rag.add(towns(2))
    weights = random_model("llama", torch.float32)
    spec = replace(model.spec, **{field: RENDERED[field]})
    other = KVLinkModel(weights, byte_tokenizer(), spec, name=model.name)
    with pytest.raises(SettingsMismatch, match="with other weights or settings"):
        KVLinkRAG.open(tmp_path / "c", model=other, embedder=embedder)
    spec = replace(model.spec, presets={"test": PromptPreset(after="!")})  # no part of a snapshot
    same = KVLinkModel(weights, byte_tokenizer(), spec, name=model.name)
    with KVLinkRAG.open(tmp_path / "c", model=same, embedder=embedder) as rag:
        assert rag.ask("Orvale?", max_new_tokens=1).trace.snapshots_encoded == 0


def test_titles_are_searched_too(rag: KVLinkRAG) -> None:
    rag.add(Document("It has a harbour.", title=town, id=town.lower()) for town in TOWNS)
    for town in TOWNS:
        best, next_best = rag.search(f"{town} harbour", k=2)
        assert best.document.id == town.lower()
        assert best.score > next_best.score


def test_search_in_lists_is_remembered_and_finds_enough(
    tmp_path: Path, embedder: WordEmbedder, model: KVLinkModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvlink_rag.retrieval.vector_index, "LEAST", 30)
    words = [f"word{n}" for n in range(40)]
    docs = [Document(f"{a} {b} {a}", id=f"{a} {b}") for a in words[:8] for b in words[8:16]]
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder, search="ivf") as rag:
        rag.add(docs)
        assert not rag.index.is_exact
        rag.delete([docs[0].id or ""])
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        assert not rag.index.is_exact
        assert rag.search("word3 word9 word3", 1)[0].document.id == "word3 word9"
        # a filter that few pass: every list must be read before fewer than k are handed over
        few = rag.search("word1 word2", 8, where=lambda d: d.text.endswith("word7"))
        assert len(few) == 8
        assert rag.check() == []
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder, search="exact") as rag:
        assert rag.index.is_exact
        assert len(rag.index) == len(docs) - 1
    with pytest.raises(ConfigError, match="expected one of auto, exact, ivf"):
        KVLinkRAG.open(tmp_path, model=model, embedder=embedder, search="hnsw")


def test_adding_again_does_no_work(rag: KVLinkRAG, embedder: WordEmbedder) -> None:
    rag.add(towns())
    before = embedder.texts
    report = rag.add(towns())
    assert (report.added, report.unchanged, report.encoded) == (0, 8, 0)
    assert embedder.texts == before


def test_derived_ids_and_shared_snapshots(rag: KVLinkRAG) -> None:
    """Equal text from two sources stays two documents that share one snapshot."""
    one, two = (Document("The same text.", metadata={"source": s}) for s in "ab")
    rag.add([one, two, one])
    assert len(rag) == 2
    assert rag.stats().snapshots == 1
    rag.delete([one.identified().id])
    assert rag.stats().snapshots == 1
    rag.delete([two.identified().id])
    assert (len(rag), rag.stats().snapshots) == (0, 0)


def test_update_and_delete(rag: KVLinkRAG) -> None:
    rag.add(towns())
    rag.update([Document("Quill is a village of weavers.", title="Quill", id="quill")])
    assert rag.get(["quill"])[0].text == "Quill is a village of weavers."
    assert rag.stats().snapshots == 8
    assert rag.search("village of weavers", 1)[0].document.id == "quill"
    assert answers_equal_oracle(rag, "village of weavers")
    assert rag.delete(["quill", "velt"]) == 2
    assert "quill" not in [hit.document.id for hit in rag.search("village of weavers", 10)]
    assert rag.stats().snapshots == 6
    with pytest.raises(DocumentNotFound, match="'quill'"):
        rag.update([Document("x", id="quill")])
    with pytest.raises(DocumentNotFound):
        rag.delete(["hux", "quill"])
    assert len(rag) == 6


def test_reopened_it_remembers(tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder) -> None:
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns())
        first = rag.search("the town of Sarno", 3)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        assert rag.search("the town of Sarno", 3) == first
        assert rag.stats().documents == 8
        assert rag.ask("the town of Sarno", k=2, max_new_tokens=2).trace.snapshots_found == 2


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_index_is_rebuilt(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, damage: str
) -> None:
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns())
        expected = rag.search("Hux", 3)
    spoil(tmp_path / "index.faiss", damage)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        assert rag.search("Hux", 3) == expected
        problems = rag.check(fix=True)
        assert len(problems) == 1
        assert problems[0].startswith("index: ")
        assert ("missing file: index.faiss" in problems[0]) == (damage == "missing")
        assert rag.check() == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_snapshot_is_encoded_again(
    rag: KVLinkRAG, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rag.add(towns())
    for path in (rag.directory / "snapshots").rglob("*.safetensors"):
        spoil(path, damage)
    with caplog.at_level(logging.INFO):
        answer = rag.ask("Which town is Velt?", k=4, max_new_tokens=4)
    assert answer.trace.snapshots_encoded == 4
    assert "snapshot" in caplog.text or "passages" in caplog.text
    assert answers_equal_oracle(rag, "Which town is Velt?")
    problems = rag.check(fix=True)
    assert len(problems) >= 4
    assert rag.check() == []


def spoil(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def test_check_finds_and_mends_each_kind(rag: KVLinkRAG) -> None:
    rag.add(towns())
    stray = rag.directory / "snapshots" / "ab" / ("ab" + "0" * 62 + "-0123456789abcdef.safetensors")
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"nothing")
    entry = next(iter(rag.catalog.iterate()))
    rag.store.delete(entry.snapshot_key)
    rag.catalog.delete(["hux"])
    problems = "\n".join(rag.check(fix=True))
    assert entry.id in problems
    assert "no document" in problems
    assert stray.name in problems
    assert rag.check() == []
    assert answers_equal_oracle(rag, "Orvale")


def test_a_lost_catalog_is_never_an_empty_collection(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns(2))
    for path in tmp_path.glob("catalog.sqlite*"):
        path.unlink()
    with pytest.raises(CatalogError, match="lost"):
        KVLinkRAG.open(tmp_path, model=model, embedder=embedder)


def test_an_interrupted_add_resumes(
    rag: KVLinkRAG, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvlink_rag.collection.adding, "BATCH", 3)
    stop_after = iter([None, None, None, None])
    real = rag.store.put

    def put(key, snapshot):  # type: ignore[no-untyped-def]
        try:
            next(stop_after)
        except StopIteration:
            raise KeyboardInterrupt from None
        return real(key, snapshot)

    monkeypatch.setattr(rag.store, "put", put)
    with pytest.raises(KeyboardInterrupt):
        rag.add(towns())
    monkeypatch.setattr(rag.store, "put", real)
    assert len(rag) == 6  # two batches are in the catalog, the second without all snapshots
    embedded = embedder.texts
    report = rag.add(towns())
    assert (report.added, report.unchanged, report.encoded) == (2, 6, 4)
    assert embedder.texts == embedded + 2
    assert answers_equal_oracle(rag, "Brisk")


def test_another_model_is_refused_or_encoded_again(
    tmp_path: Path, make_model: ModelMaker, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    other = make_model("llama", torch.float32, seed=1)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns())
    with pytest.raises(SettingsMismatch, match="reencode"):
        KVLinkRAG.open(tmp_path, model=other, embedder=embedder)
    with KVLinkRAG.open(tmp_path, model=other, embedder=embedder, reencode=True) as rag:
        assert rag.stats().snapshots == 8
        assert rag.ask("Hux", k=2, max_new_tokens=2).trace.snapshots_found == 2
        assert answers_equal_oracle(rag, "Hux")
        assert rag.check() == []
    with pytest.raises(SettingsMismatch):
        KVLinkRAG.open(tmp_path, model=model, embedder=embedder)


def test_another_embedder_is_refused_or_embedded_again(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns())
    other = WordEmbedder("salt")
    with pytest.raises(SettingsMismatch, match="embedder"):
        KVLinkRAG.open(tmp_path, model=model, embedder=other)
    with KVLinkRAG.open(tmp_path, model=model, embedder=other, reencode=True) as rag:
        assert rag.search("the town of Velt", 1)[0].document.id == "velt"
        assert other.texts >= 8
        assert rag.check() == []


def test_a_cut_short_reencoding_is_not_taken_for_a_whole_one(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns())
    other = WordEmbedder("salt")
    monkeypatch.setattr(other, "embed", lambda texts: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        KVLinkRAG.open(tmp_path, model=model, embedder=other, reencode=True)
    for maybe in (embedder, WordEmbedder("salt")):
        with pytest.raises(SettingsMismatch):
            KVLinkRAG.open(tmp_path, model=model, embedder=maybe)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder, reencode=True) as rag:
        assert rag.search("the town of Velt", 1)[0].document.id == "velt"


def test_a_change_of_links_leaves_snapshots_valid(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path, model=make_model(links=5), embedder=embedder) as rag:
        rag.add(towns())
    with KVLinkRAG.open(tmp_path, model=make_model(links=0), embedder=embedder) as rag:
        assert rag.ask("Hux", k=2, max_new_tokens=2).trace.snapshots_found == 2
        assert answers_equal_oracle(rag, "Hux")


def test_two_open_collections_see_each_others_changes(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    with (
        KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as one,
        KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as two,
    ):
        one.add(towns(4))
        assert two.search("Teldon", 1)[0].document.id == "teldon"
        two.delete(["teldon"])
        assert one.search("Teldon", 1)[0].document.id != "teldon"


def test_a_size_limit_evicts_and_answers_stay_right(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder, size_limit=100_000) as rag:
        rag.add(towns())
        assert rag.stats().snapshots < 8
        assert rag.stats().snapshot_bytes <= 100_000
        for town in TOWNS:
            assert answers_equal_oracle(rag, town, k=2)
        assert rag.stats().snapshot_bytes <= 100_000
        assert rag.check() == []


def test_a_smaller_limit_evicts_at_opening_and_sizes_may_be_text(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"model": model, "embedder": embedder}
    with KVLinkRAG.open(tmp_path, size_limit="1.5 GB", prefix_budget="1MiB", **arguments) as rag:
        rag.add(towns())
        before = rag.stats()
        assert rag.store.size_limit == 1_500_000_000
    with KVLinkRAG.open(tmp_path, size_limit="100 kB", **arguments) as rag:
        after = rag.stats()
        assert after.snapshot_bytes <= 100_000 < before.snapshot_bytes
        gone, size = (
            before.snapshots - after.snapshots,
            before.snapshot_bytes - after.snapshot_bytes,
        )
        assert f"evicted {gone} snapshots ({size} bytes)" in caplog.text
        assert answers_equal_oracle(rag, "Hux")


@pytest.mark.parametrize("bad", ["1 XB", "", "GB", "1ib", "-5", -1, 1.5, True, "nan", "1e3", "٣"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, bad: object) -> None:
    for name in ("size_limit", "prefix_budget"):
        with pytest.raises(ConfigError, match=f"{name} is .*, expected .*bytes.*20GB"):
            KVLinkRAG.open(tmp_path, **{name: bad})  # type: ignore[arg-type]


def test_questions_about_an_empty_collection(rag: KVLinkRAG) -> None:
    assert rag.search("anything", 5) == []
    answer = rag.ask("anything?", max_new_tokens=3)
    assert answer.hits == []
    assert answer.trace.passages == 0


def nested(levels: int) -> dict[str, Any]:
    """Metadata of so many levels, lists and mappings in turn."""
    value: Any = "end"
    for level in range(levels, 1, -1):
        value = [value] if level % 2 else {"in": value}
    return {"in": value}


def test_metadata_of_many_levels_come_back(rag: KVLinkRAG) -> None:
    rag.add([Document("A deep one.", id="deep", metadata=nested(MAX_DEPTH))])
    assert rag.search("A deep one.", 1)[0].document.metadata == nested(MAX_DEPTH)


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 50_000])
def test_what_is_made_json_of_has_an_end(levels: int) -> None:
    loop: list[object] = [object()]
    loop.append({"self": loop})
    for endless in ({**nested(levels), "odd": {1}}, {"loop": loop}):
        for make in (as_json, jsonable):
            with pytest.raises(DocumentError, match="holds itself, or is nested more than 100"):
                make(endless)
    assert jsonable({"odd": nested(MAX_DEPTH - 1)}) == {"odd": nested(MAX_DEPTH - 1)}


class Narrow(WordEmbedder):
    """Reads eight words of a text, and says so."""

    window = 8

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def test_text_that_the_embedder_does_not_read_is_told_once(
    tmp_path: Path, model: KVLinkModel, caplog: pytest.LogCaptureFixture
) -> None:
    short = [Document(f"Town {n} has a harbour.", id=f"s{n}") for n in range(300)]
    long = [Document(f"Town {n} has a harbour and one light more.", id=f"l{n}") for n in (1, 2)]
    fits = Document("Town 9 has a harbour and light.", title="Nine", id="nine")  # eight words
    with KVLinkRAG.open(tmp_path / "narrow", model=model, embedder=Narrow()) as rag:
        report = rag.add([long[0], *short, long[1], replace(fits, id="t", title="Town Nine"), fits])
        assert report.cut == 3  # nine words each, in two batches
        (told,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert "3 passages are longer than the embedder's window of 8 tokens" in told
        caplog.clear()
        assert rag.add([*long, *short]).cut == 0
    with KVLinkRAG.open(tmp_path / "plain", model=model, embedder=WordEmbedder()) as rag:
        assert rag.add(long).cut == 0
    assert not caplog.records


def test_a_header_takes_room_in_the_window(model: KVLinkModel, tmp_path: Path) -> None:
    long = Document("x" * (model.window - 64 - 10))
    behind = model.with_spec(replace(model.spec, header=(5,) * 50))
    for name, reader, fits in (("without", model, True), ("with", behind, False)):
        with KVLinkRAG.open(
            tmp_path / name, model=reader, embedder=WordEmbedder(), budget=0
        ) as rag:
            if fits:
                assert rag.add([long]).added == 1
            else:
                with pytest.raises(PassageTooLong, match="split_document"):
                    rag.add([long])


def test_bad_input_is_refused_and_loses_nothing(rag: KVLinkRAG) -> None:
    rag.add(towns(3))
    with pytest.raises(PassageTooLong, match="split_document"):
        rag.add([Document("short", id="s"), Document("long " * 3000, id="l")])
    with pytest.raises(DocumentError, match="no text"):
        rag.add([Document("  \n", id="empty")])
    with pytest.raises(DocumentError, match="metadata"):
        rag.add([Document("x", metadata={"when": object()})])
    for odd, match in (({1: 2}, "key 1"), ({"a": {"b": [(1, 2)]}}, r"\['b'\] is a tuple")):
        for id in (None, "x"):
            with pytest.raises(DocumentError, match=match):
                rag.add([Document("x", id=id, metadata=odd)])
    loop: dict[str, Any] = {}
    loop["self"] = [loop]
    for endless in (nested(MAX_DEPTH + 1), nested(600), nested(50_000), loop):
        for id in (None, "x"):
            with pytest.raises(DocumentError, match="holds itself, or is nested more than 100"):
                rag.add([Document("x", id=id, metadata=endless)])
    with pytest.raises(DocumentError, match="surrogate"):
        rag.add([Document("lone \ud800 surrogate", id="u")])
    with pytest.raises(ConfigError, match="iterable"):
        rag.add(Document("x"))  # type: ignore[arg-type]
    with pytest.raises(DocumentError, match=r"expected a kvlink_rag\.Document"):
        rag.add(["x"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="k is 0"):
        rag.search("x", 0)
    assert len(rag) == 3
    assert len(rag.search("town", 100)) == 3


def test_arguments_of_a_wrong_type_are_told(rag: KVLinkRAG) -> None:
    rag.add(towns(2))
    document = towns(1)[0]
    for wrong in (None, "", " \n", 7):
        with pytest.raises(PromptError, match=r"the question is .*, expected a string"):
            rag.ask(wrong)  # type: ignore[arg-type]
    for k in (2.5, "3", True, None):
        with pytest.raises(ConfigError, match=r"k is .*, expected a whole number of at least 1"):
            rag.ask("Which town?", k=k)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the question is None, expected a str"):
        rag.search(None)  # type: ignore[arg-type]
    for options, message in (
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', expected a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a finite number"),
        ({"top_p": None}, "top_p is None, expected a number"),
        ({"seed": 2**64}, "seed is .*, expected a whole number from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            rag.ask("Which town?", **options)
    for one in (document, "abc"):
        with pytest.raises(PromptError, match=r"expected a list of Document; use \[document\]"):
            rag.model.prompt(one, "Which town?")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the document of a Passage is 'x', expected a Document"):
        Passage("x")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the text of a Text is None, expected a str"):
        rag.model.prompt([document], None)  # type: ignore[arg-type]
    assert rag.ask("Which town?", k=np.int64(1), max_new_tokens=1).hits  # a whole number, too
    with pytest.raises(ConfigError, match="k is 0"):
        rag.verify(k=0)


def test_other_metadata_cost_no_vector_and_no_snapshot(
    rag: KVLinkRAG, embedder: WordEmbedder
) -> None:
    rag.add(towns(3))
    embedder.texts = 0
    before = rag.vectors([d.id for d in towns(3)])
    noted = [replace(d, metadata={"n": n}) for n, d in enumerate(towns(3))]
    report = rag.add([noted[0], noted[1], replace(noted[2], text="Teldon has a mint.")])
    assert (report.replaced, report.encoded, embedder.texts) == (3, 1, 1)
    assert [d.metadata for d in rag.documents()] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert rag.vectors(["orvale", "marnik"]).tolist() == before[:2].tolist()
    hit = rag.search("The town of Marnik has a harbour.", 1)[0]
    assert (hit.document.id, hit.document.metadata) == ("marnik", {"n": 1})
    embedder.texts = 0
    rag.add([replace(noted[0], title="Orvale, the old")])
    assert embedder.texts == 1
    rag.register([replace(noted[1], metadata={"n": 9})])  # search finds it still
    assert rag.search("The town of Marnik", 1)[0].document.metadata == {"n": 9}


def test_registered_documents_are_encoded_but_not_found(rag: KVLinkRAG) -> None:
    report = rag.register(towns(3))
    assert (report.added, report.encoded) == (3, 3)
    assert rag.search("Orvale", 3) == []
    rag.add(towns(1))
    assert [hit.document.id for hit in rag.search("Orvale", 3)] == ["orvale"]
    assert rag.stats().embedded == 1


def test_registering_over_what_search_finds_is_told(
    rag: KVLinkRAG, caplog: pytest.LogCaptureFixture
) -> None:
    rag.add(towns(2))
    rag.register(towns(2))
    assert not caplog.records
    changed = [replace(document, text=f"New. {document.text}") for document in towns(1)]
    rag.register(changed)
    assert "registering replaced 1 documents that search could find" in caplog.text
    assert rag.stats().embedded == 1


def test_two_rounds_find_what_the_question_does_not_name(rag: KVLinkRAG) -> None:
    rag.add(
        [
            Document("Falcon: Mira Tolt.", id="one"),
            Document("Mira Tolt: Hux.", id="two"),
            *[Document(f"Something else, {word}.", id=word) for word in TOWNS],
        ]
    )
    question = "Which birthplace has the head of Falcon?"
    assert "two" not in [hit.document.id for hit in rag.search(question, 2)]
    assert [hit.document.id for hit in rag.search(question, 2, rounds=2)] == ["one", "two"]


def test_hits_by_id_are_the_same_hits_and_share_more_runs(rag: KVLinkRAG) -> None:
    rag.add(towns(4))
    questions = ["Which town is Teldon?", "Which town is Brisk?"]
    for order in ("score", "id"):
        rag.reuse.prefix.clear()
        answers = [rag.ask(q, k=4, order=order, max_new_tokens=6) for q in questions]
        for question, answer in zip(questions, answers, strict=True):
            assert answer.hits == rag.search(question, 4)  # listed best first, with their scores
            laid = [hit.document for hit in answer.hits]
            laid = sorted(laid, key=lambda d: d.id) if order == "id" else laid
            parts = rag.model.prompt(laid, question)
            assert answer.text == rag.model.generate(parts, mode="masked", max_new_tokens=6)
        first, second = (answer.trace for answer in answers)
        everything = second.prefix_tokens + second.computed_tokens
        assert answers[0].hits[0] != answers[1].hits[0]
        # by score the first passage differs, by id only the question does
        begin = len(rag.model.layout(rag.model.prompt([], "")).token_ids)
        if order == "score":
            assert second.prefix_tokens <= begin
        else:
            assert second.prefix_tokens > everything - begin - len(questions[1])
            assert second.computed_tokens < first.computed_tokens


def test_the_order_is_remembered_and_a_wrong_one_refused(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        assert rag.order() == "score"
        with pytest.raises(ConfigError, match="found order 'title', expected one of score, id"):
            rag.ask("Where?", order="title")
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder, order="id") as rag:
        assert rag.order() == "id"
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        assert (rag.order(), rag.order("score")) == ("id", "score")
        with pytest.raises(ConfigError, match="expected one of score, id"):
            KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder, order="best")


def test_equal_scores_keep_their_order_by_score_and_follow_ids_by_id() -> None:
    hits = [Hit(Document("same text", id=id), 0.5) for id in ("c", "a", "b")]
    assert in_order(hits, "score") == hits
    assert [hit.document.id for hit in in_order(hits, "id")] == ["a", "b", "c"]


def test_questions_are_answered_while_documents_are_added(
    rag: KVLinkRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    rag.add(towns(4))
    encoding, asked = threading.Event(), threading.Event()
    real = rag.store.put

    def put(key, snapshot):  # type: ignore[no-untyped-def]
        if threading.current_thread() is writer:
            encoding.set()
            asked.wait()
        return real(key, snapshot)

    monkeypatch.setattr(rag.store, "put", put)
    writer = threading.Thread(target=rag.add, args=(towns(),))
    writer.start()
    encoding.wait()
    assert answers_equal_oracle(rag, "Orvale", k=2)
    assert writer.is_alive()
    asked.set()
    writer.join()
    assert len(rag) == 8


def test_an_existing_folder_keeps_its_permissions(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    tmp_path.chmod(0o755)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns(1))
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "snapshots").stat().st_mode & 0o777 == 0o700
    files = [path for path in (tmp_path / "snapshots").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_an_index_newer_than_a_restored_catalog_is_rebuilt(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    """The rows of what was added after the backup are given again, to other documents."""
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        rag.add(towns(2))
    shutil.copy(tmp_path / "c" / "catalog.sqlite", tmp_path / "backup")
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        for document in towns()[2:]:
            rag.add([document])
    shutil.copy(tmp_path / "backup", tmp_path / "c" / "catalog.sqlite")
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        assert len(rag.index) == len(rag) == 2
        rag.add([Document("A lamp is red.", id="lamp")])
        assert rag.search("a red lamp", 1)[0].document.id == "lamp"


def test_replacing_the_last_change_before_the_index_is_loaded_rebuilds_nothing(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    """No row tells any more that the catalog was ever at the index's version."""
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add(towns(7))
        rag.add(towns()[7:])
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add([replace(towns()[7], text="Hux is a village of weavers.")])
        assert rag.search("village of weavers", 1)[0].document.id == "hux"
        assert rag.check() == []
    assert not caplog.records


def forge(rag: KVLinkRAG, other: KVLinkModel, ids: list[str]) -> None:
    """Put snapshots that another model made under this model's keys."""
    for entry in rag.catalog.get(ids):
        made = other.encoder.one(other.passage_tokens(entry.document))
        rag.store.put(str(entry.snapshot_key), made)


def test_verify_finds_snapshots_of_other_weights(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder
) -> None:
    model, other = make_model("llama"), make_model("llama", seed=3)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder) as rag:
        rag.add([Document(f"Tower {i} has {i} bells of bronze.", id=str(i)) for i in range(50)])
        fine = rag.verify(k=2)
        assert (fine.holds, fine.compared, fine.wrong) == (True, 32, ())
        ids = [str(i) for i in range(40, 50)]
        forge(rag, other, ids)
        found = rag.verify(k=2, seed=0)  # 32 of 50 miss all ten once in 230,000 draws
        assert not found.holds
        assert set(found.wrong) <= set(ids)
        assert "stored snapshots are NOT what this model encodes" in found.message
        whole = rag.verify(k=2, sample=None)
        assert (whole.compared, set(whole.wrong)) == (50, set(ids))
        assert rag.check() == []  # their checksums are right
        assert len(rag.check(sample=None)) == 10
        rag.check(fix=True, sample=None)
        assert rag.verify(sample=None).holds


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "fp8"])
def test_verify_compares_snapshots_of_a_codec(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder, codec: str
) -> None:
    model, other = make_model("llama"), make_model("llama", seed=3)
    with KVLinkRAG.open(tmp_path, model=model, embedder=embedder, codec=codec) as rag:
        rag.add([Document(f"Tower {i} has {i} bells of bronze.", id=str(i)) for i in range(4)])
        assert rag.verify(k=2).holds
        entry = rag.catalog.get(["1"])[0]
        made = other.encoder.one(other.passage_tokens(entry.document))
        rag.store.put(str(entry.snapshot_key), in_codec(made, codec))
        assert rag.verify(k=1, sample=None).wrong == ("1",)


def test_one_text_from_several_sources_fills_one_place(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder
) -> None:
    copies = [Document("The mill has nine wheels.", id=f"mill{i}") for i in range(4)]
    others = [Document("The mill burnt.", id="fire"), Document("A mill stands there.", id="there")]
    with KVLinkRAG.open(tmp_path, model=make_model("llama"), embedder=embedder) as rag:
        rag.add([*copies, *others])
        answer = rag.ask("How many wheels has the mill?", k=3, max_new_tokens=2)
        assert [len(hit.also) for hit in answer.hits] == [3, 0, 0]
        best = answer.hits[0]
        assert {best.document.id, *(d.id for d in best.also)} == {d.id for d in copies}
        assert {hit.document.id for hit in answer.hits[1:]} == {"fire", "there"}
        assert answer.trace.passages == 3
        assert len(rag.search("How many wheels has the mill?", k=3)) == 3  # search hides nothing
        turn = Conversation(rag, k=3).ask("How many wheels has the mill?", max_new_tokens=2)
        list(turn)
        assert len({hit.document.text for hit in turn.hits}) == 3
