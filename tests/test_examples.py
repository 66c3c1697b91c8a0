"""Rows and schemas: every public schema by hand, bad rows counted or refused, metrics by hand."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from kvlink_rag import Document
from kvlink_rag.datasets.answers import contained, exact_match, f1, normalized
from kvlink_rag.datasets.rows import Source, rows, shuffled
from kvlink_rag.datasets.schemas import Example, multi_news, question_answering, samsum
from kvlink_rag.datasets.sets import SETS, Skipped, filled_up, find_set, gold_at, read
from kvlink_rag.errors import ConfigError, ExampleError, MissingExtra

HOTPOT = {
    "_id": "5a",
    "question": "Who?",
    "answer": "Rush",
    "supporting_facts": [["B", 0]],
    "context": [["A", ["One.", " Two."]], ["B", ["Three."]]],
}
ROWS = {
    "lost-in-the-middle": {
        "question": "Who?",
        "answers": ["Rush"],
        "ctxs": [
            {"title": "A", "text": "One. Two.", "isgold": False},
            {"title": "B", "text": "Three.", "isgold": True},
        ],
    },
    "hotpotqa": HOTPOT,
    "hotpotqa-hub": {
        **{k: HOTPOT[k] for k in ("question", "answer")},
        "id": "5a",
        "supporting_facts": {"title": ["B"], "sent_id": [0]},
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
    },
    "2wikimultihopqa-json": {
        **HOTPOT,
        "context": json.dumps(HOTPOT["context"]),
        "supporting_facts": json.dumps(HOTPOT["supporting_facts"]),
    },
    "musique": {
        "id": "2hop__1_2",
        "question": "Who?",
        "answer": "Rush",
        "answer_aliases": [],
        "paragraphs": [
            {"idx": 0, "title": "A", "paragraph_text": "One. Two.", "is_supporting": False},
            {"idx": 1, "title": "B", "paragraph_text": "Three.", "is_supporting": True},
        ],
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_every_schema_gives_the_same_example(name: str) -> None:
    found = question_answering(ROWS[name], 7)
    assert found.documents == (Document("One. Two.", title="A"), Document("Three.", title="B"))
    assert (found.question, found.answers, found.gold) == ("Who?", ("Rush",), (1,))
    assert found.id == {"lost-in-the-middle": "7", "musique": "2hop__1_2"}.get(name, "5a")


def test_aliases_are_answers_too() -> None:
    trivia = {"question": "?", "question_id": "tc_1", "answer": {"value": "A", "aliases": ["B"]}}
    assert question_answering(trivia, 0).answers == ("A", "B")
    assert question_answering({**ROWS["musique"], "answer_aliases": ["R"]}, 0).answers[-1] == "R"
    assert question_answering({"question": "?", "answer": ["x", "y"]}, 0).answers == ("x", "y")


def test_summaries() -> None:
    news = multi_news({"document": "First. ||||| Second.\n|||||", "summary": "Both."}, 3)
    assert [d.text for d in news.documents] == ["First.", "Second."]
    turns = [f"A: {n}" for n in range(6)]
    chat = samsum({"id": "9", "dialogue": "\r\n".join(turns), "summary": "Six."}, 0)
    assert [d.text.splitlines() for d in chat.documents] == [turns[:4], turns[4:]]
    assert chat.answers == ("Six.",)


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "x"},
        {"question": "?"},
        {"question": "?", "answer": 3},
        {"question": " ", "answer": "x"},
        {"question": "?", "answers": []},
        {"question": "?", "answer": ""},
        {**HOTPOT, "context": "not JSON"},
        {**HOTPOT, "context": [["A"]]},
        {"question": "?", "answers": ["x"], "ctxs": [{"title": "no text"}]},
        {"question": "?", "answers": ["x"], "ctxs": [{"text": 5}]},
        {"question": "?", "answers": ["x"], "ctxs": 5},
    ],
)
def test_rows_of_another_schema_are_refused(row: dict[str, object]) -> None:
    with pytest.raises(ExampleError):
        question_answering(row, 0)


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    data = [{"question": f"q{i}", "answer": ["a"]} for i in range(3)]
    lines = "\n".join(map(json.dumps, data)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(data))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.jsonl.gz", "a.parquet"):
        assert list(rows(Source(str(tmp_path / name)))) == data, name
    assert list(rows(Source(str(tmp_path)))) == data * 4


def test_bad_lines_are_counted_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = json.dumps({"question": "?", "answer": "x"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good, "{", "[1]", '{"question": "?"}', good]))
    skipped = Skipped()
    assert len(list(read(find_set("nq"), Source(str(path)), skipped))) == 2
    assert skipped.reasons == {"not a JSON object": 2, "wrong schema": 1}
    assert "line 2" in caplog.text
    assert "'answer or answers'" in caplog.text
    caplog.clear()
    path.write_text("{\n" * 9)
    assert list(read(find_set("nq"), Source(str(path)), skipped)) == []
    assert skipped.reasons["not a JSON object"] == 11
    assert caplog.text.count("skipped") == 3  # two were shown above, five is enough
    path.write_text("\n".join([good, "{"]))
    with pytest.raises(ExampleError, match="line 2"):
        list(read(find_set("nq"), Source(str(path)), Skipped("refuse")))


@pytest.mark.parametrize("path", ["/no/such/file", "no/such/file.jsonl", "a/b/c", "notes.txt"])
def test_what_is_no_source_is_refused(path: str, tmp_path: Path) -> None:
    if path == "notes.txt":
        (tmp_path / path).touch()
        path = str(tmp_path / path)
    with pytest.raises(ConfigError, match="data set"):
        list(rows(Source(path)))
    with pytest.raises(ConfigError, match="expected one of nq"):
        find_set("nqq")


def test_hub_names_are_streamed_and_scripts_read_as_parquet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub is out of reach in tests: what `datasets` is asked for, what its errors become."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked: list[tuple[object, ...]] = []

    def load(path: str, config: str | None, **arguments: object) -> list[dict[str, str]]:
        asked.append((path, config, arguments.get("split"), arguments.get("revision")))
        assert arguments["streaming"] is True
        if path == "owner/script" and "revision" not in arguments:
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if path == "owner/gone":
            raise FileNotFoundError("Couldn't find owner/gone")
        return [{"question": "?", "answer": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("owner/plain", "owner/script"):
        assert len(list(rows(Source(path, "small", "dev")))) == 1
    parquet = "refs/convert/parquet"
    assert asked == [
        ("owner/plain", "small", "dev", None),
        ("owner/script", "small", "dev", None),
        ("owner/script", "small", "dev", parquet),
    ]
    with pytest.raises(ConfigError, match=r"owner/gone is neither a file.*Couldn't find"):
        list(rows(Source("owner/gone")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"kvlink-rag\[eval\]"):
        list(rows(Source("owner/plain")))


def test_shuffled_holds_everything_once_and_depends_on_the_seed() -> None:
    found = [list(shuffled(range(100), random.Random(seed), 10)) for seed in (0, 0, 1)]
    assert sorted(found[0]) == list(range(100))
    assert found[0] == found[1] != found[2]
    assert found[0] != list(range(100))


# The two normal forms and the scores below were worked out by hand from the definition of
# SQuAD 1.1 (lower case, punctuation out, articles out, white space).


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The  Cat's\tpyjamas!", "cats pyjamas"),
        ("a an the", ""),
        ("Theatre, an-thology", "theatre anthology"),
        ("U.S.A.", "usa"),
        ("Röntgen “quoted”", "röntgen “quoted”"),
    ],
)
def test_normal_form(text: str, form: str) -> None:
    assert normalized(text) == form


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Beatles.", ["beatles"], (1, 1, 1)),
        # 1 word of 2 said, 1 of 1 wanted: 2 · (1/2 · 1) / (1/2 + 1) = 2/3
        ("John Beatles", ["beatles"], (1, 0, 2 / 3)),
        # said: it was in 1911 (4), wanted: 1911 (1), 1 common: 2 · (1/4) / (5/4) = 0.4
        ("It was in 1911", ["1912", "1911"], (1, 0, 0.4)),
        # said: x x y, wanted: x y y; common x, y = 2: precision = recall = 2/3
        ("x x y", ["x y y"], (0, 0, 2 / 3)),
        # contained inside a word, as the paper's metric has it
        ("a scarf", ["car"], (1, 0, 0)),
        ("", ["x"], (0, 0, 0)),
        ("anything", ["the"], (0, 0, 0)),
        ("the", ["a"], (0, 1, 0)),
    ],
)
def test_metrics_by_hand(
    prediction: str, answers: list[str], expected: tuple[float, float, float]
) -> None:
    found = (contained(prediction, answers), exact_match(prediction, answers))
    assert (*found, f1(prediction, answers)) == pytest.approx(expected)


def examples(count: int) -> list[Example]:
    return [
        Example(str(i), f"q{i}", (f"answer{i} ",), (Document(f"It is answer{i}."),))
        for i in range(count)
    ]


def test_an_oracle_set_is_filled_up_with_other_questions_passages() -> None:
    twins = [Example(f"t{i}", "q", ("answer3",), (Document(f"Also answer3 {i}."),)) for i in "abc"]
    pool = [*examples(8), *twins]
    filled = filled_up(pool, 5, seed=1)
    assert filled == filled_up(pool, 5, seed=1) != filled_up(pool, 5, seed=2)
    for before, after in zip(pool, filled, strict=True):
        assert len(set(after.documents)) == len(after.documents) == 5
        assert [after.documents[i] for i in after.gold] == list(before.documents)
        holding = [d for d in after.documents if contained(d.text, after.answers)]
        assert holding == list(before.documents)
    assert len({after.gold for after in filled}) > 1
    assert filled_up(filled, 3, seed=1) == filled


@pytest.mark.parametrize("place", range(5))
def test_gold_goes_where_it_is_wanted_and_the_others_keep_their_order(place: int) -> None:
    before = filled_up(examples(8), 5, seed=0)[2]
    after = gold_at(before, place)
    gold = before.documents[before.gold[0]]
    assert (after.gold, after.documents[place]) == ((place,), gold)
    assert [d for d in after.documents if d != gold] == [d for d in before.documents if d != gold]
    assert gold_at(after, before.gold[0]) == before


@pytest.mark.parametrize("place", [-1, 5])
def test_no_such_place(place: int) -> None:
    with pytest.raises(ExampleError, match="expected one gold document"):
        gold_at(filled_up(examples(8), 5, seed=0)[0], place)
    with pytest.raises(ExampleError, match="found 2 gold"):
        gold_at(examples(1)[0].with_documents([Document("a"), Document("b")], (0, 1)), 0)


@pytest.mark.parametrize(
    ("name", "file", "count", "documents"),
    [
        ("nq", "nq_open_oracle.jsonl", 2655, 1),
        ("hotpotqa", "hotpotqa_dev_distractor_200.jsonl", 200, 10),
        ("musique", "musique_cacheblend_150.json", 150, 10),
    ],
)
def test_real_files_load_whole(
    shared_data: Path, name: str, file: str, count: int, documents: int
) -> None:
    found = list(read(SETS[name], Source(str(shared_data / file)), Skipped("refuse")))
    assert len(found) == len({example.id for example in found}) == count
    sizes = [len(example.documents) for example in found]
    assert sum(size == documents for size in sizes) > 0.95 * count
    if name == "hotpotqa":
        assert all(len(example.gold) == 2 for example in found)
        assert {example.kind for example in found} == {"bridge", "comparison"}
    if name == "nq":
        text = found[0].documents[0].text
        assert contained(text, found[0].answers)
        filled = filled_up(found, 10, seed=0)
        assert all(len(example.gold) == 1 for example in filled)
        short = [example.answers for example in filled if len(example.documents) != 10]
        assert short == [("S",)]  # the one answer that every passage contains
