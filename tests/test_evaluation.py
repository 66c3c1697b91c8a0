"""The harness whole: command line to table, on tiny models with random weights and on real data.

What the answers say means nothing here; that scores, counts and intervals follow from them does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import WordEmbedder, byte_spec, byte_tokenizer, random_model
from transformers import AutoTokenizer

from kvlink_rag import Document, KVLinkModel, Text
from kvlink_rag.cli.main import main
from kvlink_rag.datasets.schemas import Example
from kvlink_rag.errors import ConfigError, MissingExtra, StorageError
from kvlink_rag.evaluation.decoding import decode, likelihood
from kvlink_rag.evaluation.modes import InMemory, contenders
from kvlink_rag.evaluation.records import Record, Records, read
from kvlink_rag.evaluation.retrieved import Corpus, recall
from kvlink_rag.evaluation.scores import scorer
from kvlink_rag.evaluation.summary import agreement, bootstrap, summarize, table
from kvlink_rag.prompt.published import KVLINK5_LLAMA32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `from_pretrained` opens: tiny, with random weights and 5 link tokens."""
    root = tmp_path_factory.mktemp("model")
    random_model("llama", torch.float32).save_pretrained(root)
    byte_tokenizer().save_pretrained(root)
    (root / "kvlink.json").write_text(byte_spec().to_json())
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four questions with one gold passage each, as lost-in-the-middle writes them."""
    path = tmp_path / "nq.jsonl"
    rows = [
        {
            "question": f"Who built harbour {i}?",
            "answers": [f"builder{i}"],
            "ctxs": [{"title": f"H{i}", "text": f"Harbour {i} was built by builder{i}."}],
        }
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    return main(["eval", *map(str, arguments), "--max-new-tokens", "6", "--device", "cpu"])


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_modes_side_by_side(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "out"
    modes = "full,closed,masked,reuse,reuse:0"
    options = ["--data", data, "--documents", 3, "--gold-at", "0,2", "--modes", modes]
    assert run("nq", "--model", model, "--out", out, *options, "--batch", 3) == 0
    shown = capsys.readouterr().out
    found = summary(out)
    lines = {(line["mode"], line["gold_at"]): line for line in found["lines"]}
    assert set(lines) == {(m, place) for m in modes.split(",") for place in (None, 0, 2)}
    assert all(line["examples"] == 4 for line in lines.values())
    assert found["agreement"] == {
        "model": str(model), "compared": 8, "identical": 8, "ties": 0, "differ": 0,
        "tolerance": 1e-4,
    }  # fmt: skip
    reuse, masked, full = (lines[mode, None] for mode in ("reuse", "masked", "full"))
    assert reuse["scores"] == masked["scores"]
    assert reuse["difference"] == masked["difference"]
    assert full["difference"] is None
    assert reuse["computed_tokens"] < masked["computed_tokens"] == masked["prompt_tokens"]
    assert all(line["ttft_ms"] > 0 for line in lines.values())
    assert "8 of 8 answers identical" in shown
    assert (out / "summary.md").read_text() == shown
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    placed = [r for r in read(out) if r.key == "1@2" and r.mode == "reuse"]
    assert [r.gold_at for r in placed] == [2]
    assert placed[0].scores["contained"] == float("builder1" in placed[0].prediction.lower())


def test_bfloat16_differs_only_where_two_tokens_are_as_good(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """The code would be 1 if an answer differed elsewhere; random weights tie often."""
    options = ["--data", data, "--documents", 3, "--dtype", "bfloat16", "--modes", "masked,reuse"]
    assert run("nq", "--model", model, "--out", tmp_path, *options) == 0
    seen = summary(tmp_path)["agreement"]
    assert seen["tolerance"] == 6e-2
    assert seen["identical"] + seen["ties"] == seen["compared"] == 4


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["nq", "--model", model, "--data", data, "--out", out, "--modes"]
    assert run(*options, "reuse") == 0
    whole = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert run(*options, "reuse,masked", "--batch", 2) == 0
    again = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(again) == 8
    kept = [row for row in again if row["mode"] == "reuse"]
    assert [r["prediction"] for r in kept] == [r["prediction"] for r in whole]
    assert kept[:2] == whole[:2]
    assert run(*options, "reuse", "--documents", 2) == 1
    assert "documents is None, now 2" in capsys.readouterr().err
    (out / "answers.jsonl").write_text('{"mode": 1}\n')
    with pytest.raises(StorageError, match="no answer"):
        read(out)


def test_retrieved_passages_and_their_recall(
    model: Path, data: Path, tmp_path: Path, saved_pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    options = ["--model", model, "--data", data, "--out", out, "--modes", "reuse"]
    options += ["--embedder", saved_pair[1]]
    assert run("nq", *options, "--retrieve", 4) == 0
    assert summary(out)["lines"][0]["recall"] == 1.0
    assert all(r.reused_tokens > 0 for r in read(out))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "Nothing."}\n{"title": "no text"}\n')
    out = tmp_path / "other"
    options[5] = out
    assert run("nq", *options, "--retrieve", 1, "--corpus", corpus) == 0
    assert summary(out)["lines"][0]["recall"] == 0.0
    assert summary(out)["skipped"] == {"corpus row": 1}


@pytest.mark.parametrize("mode", ["full", "masked", "reuse", "naive"])
@pytest.mark.parametrize("answer", ["x", "It is Tarn."])
def test_the_likelihood_of_an_answer_is_its_tokens_one_by_one(mode: str, answer: str) -> None:
    """Against a prefill of the prompt and the answer so far; decoding leaves no mark."""
    model = KVLinkModel(random_model("llama", torch.float32), byte_tokenizer(), byte_spec())
    (contender,) = contenders(model, [mode])
    example = Example("1", "Who?", ("x",), (Document("One.", title="A"), Document("Two.")))
    parts = contender.prompt(example)
    started = contender(parts, InMemory(model))
    decode(model, [started], 3)
    found = likelihood(contender.model, started, answer)
    ids = [*model.tokenizer.encode(answer), model.tokenizer.hf.eos_token_id]
    wanted = []
    for said, token in enumerate(ids):
        so_far = [*parts, Text(answer[:said])] if said else parts
        if mode == "naive":
            logits = contender(so_far, InMemory(model)).logits
        else:
            logits = contender.model.prefill(so_far, "full" if mode == "full" else "masked").logits
        logits = logits.clone()
        logits[model.spec.special_ids()] = -torch.inf
        wanted.append(-float(logits.log_softmax(-1)[token]))
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-3)


def test_recall_counts_gold_passages_or_answers() -> None:
    documents = (Document("Tarn cranes", title="T"), Document("Orvale harbour", title="O"))
    both = Example("1", "Tarn cranes?", ("tin",), documents, (0, 1))
    assert recall(both, documents[:1]) == 0.5
    assert recall(both, documents) == 1.0
    unknown = Example("2", "?", ("tin",))
    assert recall(unknown, [Document("They carry Tin.")]) == 1.0
    assert recall(unknown, [Document("They carry coal.")]) == 0.0
    others = [Document(f"Other matter {i}") for i in range(5)]
    corpus = Corpus([*others, *documents], WordEmbedder())
    ((found, share),) = corpus.ask([both], 1)
    assert (found.documents, found.gold, share) == (documents[:1], (0,), 0.5)
    with pytest.raises(ConfigError, match="no passages"):
        Corpus([], WordEmbedder())


@pytest.mark.parametrize("on_bad", ["skip", "refuse"])
def test_bad_examples_are_skipped_for_all_modes_or_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_bad: str
) -> None:
    """No documents, too many for the link ids, too long, twice the same id, a missing column."""
    good = {"question": "?", "answers": ["x"], "ctxs": [{"text": "x"}]}
    rows = [
        {**good, "id": 1},
        {**good, "id": 2, "ctxs": []},
        {**good, "id": 3, "ctxs": [{"text": "x"}] * 41},
        {**good, "id": 4, "ctxs": [{"text": "long " * 1700}]},
        {**good, "id": 1},
        {"question": "?"},
    ]
    path, out = tmp_path / "rows.json", tmp_path / "out"
    path.write_text(json.dumps(rows))
    options = ["--model", model, "--data", path, "--out", out, "--modes", "full,reuse"]
    code = run("nq", *options, "--on-bad", on_bad)
    if on_bad == "refuse":
        assert code == 1
        assert "answer or answers" in capsys.readouterr().err
        return
    assert code == 0
    assert summary(out)["skipped"] == {
        "wrong schema": 1, "ExampleError": 2, "TooManyPassages": 1, "PromptTooLong": 1
    }  # fmt: skip
    assert [(r.mode, r.key) for r in read(out)] == [("full", "1"), ("reuse", "1")]


def test_nothing_usable_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "?", "answer": "x"}\n')
    assert run("nq", "--model", model, "--data", path, "--out", tmp_path / "out") == 1
    assert "all examples were skipped" in capsys.readouterr().err
    assert main(["eval", "nq"]) == 1
    assert "--compare" in capsys.readouterr().err


def test_rouge_by_hand_and_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest common subsequence the cat sat = 3 of 4 said and 3 of 3 wanted: F = 6/7."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtra, match=r"pip install 'kvlink-rag\[eval\]'"):
        scorer("rouge")
    monkeypatch.undo()
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    score = scorer("rouge")
    assert score("the black cat sat", ["dogs", "the cat sat"])["rouge_l"] == pytest.approx(6 / 7)
    assert score("cats", ["the cat"])["rouge_l"] == pytest.approx(2 / 3)  # stemmed


def asked_in_kinds(directory: Path) -> Path:
    """A folder of questions of two kinds, each over two and over three passages."""
    directory.mkdir()
    for kind in ("bridge", "comparison"):
        for count in (2, 3):
            ctxs = [
                {"title": f"H{i}", "text": f"Harbour {i} is old.", "isgold": not i}
                for i in range(count)
            ]
            rows = [
                {"question": f"{kind} {i}?", "answers": ["old"], "ctxs": ctxs, "kind": kind}
                for i in range(2)
            ]
            lines = "".join(
                json.dumps({"id": f"{kind}-{count}-{i}", **r}) + "\n" for i, r in enumerate(rows)
            )
            (directory / f"{kind}-{count}.jsonl").write_text(lines)
    return directory


def test_a_line_for_each_kind_and_number_of_passages(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    data = asked_in_kinds(tmp_path / "asked")
    options = ["--data", data, "--modes", "full,reuse", "--by", "kind,passages"]
    out = tmp_path / "out"
    assert run("nq", "--model", model, "--out", out, *options) == 0
    lines = [line for line in summary(out)["lines"] if line["mode"] == "reuse"]
    assert [(line["kind"], line["passages"], line["examples"]) for line in lines] == [
        (None, None, 8),
        *(("bridge", 2, 2), ("bridge", 3, 2), ("comparison", 2, 2), ("comparison", 3, 2)),
    ]
    assert all(line["difference"] is not None for line in lines)
    assert "| mode | kind | passages |" in capsys.readouterr().out
    assert main(["eval", "--compare", str(out), "--out", str(tmp_path / "k"), "--by", "kind"]) == 0
    kinds = [(line["mode"], line["kind"]) for line in summary(tmp_path / "k")["lines"]]
    assert kinds == [
        (m, kind) for m in ("full", "reuse") for kind in (None, "bridge", "comparison")
    ]
    assert main(["eval", "nq", "--by", "length"]) == 2
    assert "expected kind, passages" in capsys.readouterr().err


def test_answers_written_before_kinds_were_known_can_still_be_read(tmp_path: Path) -> None:
    with Records(tmp_path, {}) as records:
        records.add(record("reuse", "1", 1.0))
    path = tmp_path / "answers.jsonl"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("kind", "passages")}
    path.write_text(json.dumps(old) + "\n")
    assert read(tmp_path) == [record("reuse", "1", 1.0)]


def test_groups_are_paired_with_their_own_reference() -> None:
    """Reuse is right on a's one and wrong on b's; full the other way round, on each kind."""
    records = [
        record(mode, key, score, kind=kind)
        for mode, key, score, kind in (
            ("full", "1", 0.0, "a"), ("reuse", "1", 1.0, "a"),
            ("full", "2", 1.0, "b"), ("reuse", "2", 0.0, "b"),
        )
    ]  # fmt: skip
    lines = {(x.mode, x.kind): x for x in summarize(records, by=("kind",))}
    found = [lines["reuse", kind].difference for kind in (None, "a", "b")]
    assert [each and each.mean for each in found] == [0.0, 1.0, -1.0]


def record(mode: str, key: str, score: float, **fields: object) -> Record:
    values = {
        "data_set": "nq", "model": "m", "mode": mode, "key": key, "question": "?",
        "answers": ("x",), "prediction": "x", "scores": {"contained": score}, "gold_at": None,
        "recall": None, "ttft_ms": 1.0, "prompt_tokens": 5, "reused_tokens": 0,
        "computed_tokens": 5, "tokens": (1, 2, 3), "margins": (0.5, 1e-6, 0.5),
    }  # fmt: skip
    return Record(**{**values, **fields})  # type: ignore[arg-type]


def test_the_interval_is_the_one_of_the_normal_approximation() -> None:
    """For a share the percentile bootstrap must lie near p ± 1.96 · sqrt(p (1 - p) / n)."""
    found = bootstrap([1.0] * 300 + [0.0] * 700)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.003)
    assert found.high == pytest.approx(0.3 + half, abs=0.003)
    assert bootstrap([1.0] * 5) == bootstrap([1.0] * 9)


def test_differences_are_paired_and_places_count_as_one_example() -> None:
    """Two examples at two places: reuse is right on 1 + 0 and 1 + 1, full everywhere but once."""
    rows = [(("a", 0), 1, 1), (("a", 1), 0, 1), (("b", 0), 1, 1), (("b", 1), 1, 0)]
    records = [
        record(mode, f"{name}@{place}", score, gold_at=place)
        for (name, place), reuse, full in rows
        for mode, score in (("reuse", float(reuse)), ("full", float(full)))
    ]
    lines = {(line.mode, line.gold_at): line for line in summarize(records)}
    assert lines["reuse", None].examples == 2
    assert lines["reuse", None].scores["contained"].mean == 0.75
    difference = lines["reuse", None].difference
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == (0.0, -0.5, 0.5)
    assert lines["reuse", 1].scores["contained"].mean == 0.5
    assert lines["full", 1].difference is None
    head, rule, *cells = table(summarize(records))
    assert len({line.count("|") for line in (head, rule, *cells)}) == 1
    assert len(cells) == 6


def test_agreement_tells_ties_from_faults() -> None:
    masked = record("masked", "1", 1.0)
    cases = {
        (1, 2, 3): "identical",
        (1, 9, 9): "ties",  # first differs where the margin is 1e-6
        (9, 2, 3): "differ",  # first differs where it is 0.5
        (1, 2): "differ",
    }
    for tokens, verdict in cases.items():
        found = agreement([masked, record("reuse", "1", 1.0, tokens=tokens)], "m", 1e-4)
        assert (found.compared, getattr(found, verdict)) == (1, 1), tokens
    assert agreement([masked], "m", 1e-4).compared == 0


def test_a_fault_shows_in_the_exit_code(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["nq", "--model", model, "--data", data, "--out", out, "--modes", "masked,reuse"]
    assert run(*options) == 0
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        if row["mode"] == "reuse":
            row["tokens"][0] += 1
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*options) == 1


def test_several_directories_in_one_table(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        options = ["--data", data, "--out", tmp_path / name, "--limit", 2]
        assert run("nq", "--model", model, *options, "--modes", "reuse") == 0
    capsys.readouterr()
    both = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["eval", "--compare", *both, "--out", str(tmp_path / "both")]) == 0
    assert "| reuse |" in capsys.readouterr().out
    assert (tmp_path / "both" / "summary.md").exists()
    assert main(["eval", "--compare", str(tmp_path / "none")]) == 1


@pytest.fixture(scope="module")
def llama3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, the real Llama-3 tokenizer and the published spec."""
    root = tmp_path_factory.mktemp("llama3")
    random_model("llama", torch.float32, vocab_size=128256).save_pretrained(root)
    AutoTokenizer.from_pretrained(shared_data / "llama3_tokenizer").save_pretrained(root)
    (root / "kvlink.json").write_text(KVLINK5_LLAMA32.to_json())
    return root


REAL = {
    "nq": ("nq_open_oracle.jsonl", ["--documents", "10", "--gold-at", "1", "--limit", "2"]),
    "hotpotqa": ("hotpotqa_dev_distractor_200.jsonl", ["--limit", "2"]),
    "musique": ("musique_cacheblend_150.json", ["--limit", "1"]),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_in_the_published_prompt(
    shared_data: Path, tmp_path: Path, llama3: Path, name: str
) -> None:
    """Reuse says what the masked prefill says; the code is 1 if an answer differed."""
    file, options = REAL[name]
    data = ["--data", shared_data / file, "--modes", "masked,reuse", "--on-bad", "refuse"]
    assert run(name, "--model", llama3, "--out", tmp_path, *data, *options) == 0
    seen = summary(tmp_path)["agreement"]
    assert seen["compared"] == int(options[-1])
    assert seen["identical"] + seen["ties"] == seen["compared"]
    assert all(r.reused_tokens > r.prompt_tokens / 2 for r in read(tmp_path) if r.mode == "reuse")


def test_records_are_closed_when_a_run_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Records(tmp_path, {"a": 1}) as records:
            records.add(record("reuse", "1", 1.0))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert read(tmp_path) == [record("reuse", "1", 1.0)]
    with Records(tmp_path, {"a": 1}) as records:
        assert records.done == {("reuse", "1")}
    with pytest.raises(ConfigError, match="a is 1, now 2"):
        Records(tmp_path, {"a": 2})
