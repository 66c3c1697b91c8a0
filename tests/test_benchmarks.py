"""The benchmarks run whole, on a tiny shape, and end in one JSON object with the promised keys."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import mmap
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker

import kvlink_rag.engine.backbone
import kvlink_rag.engine.workspaces
from kvlink_rag import Document, KVLinkModel
from kvlink_rag.cli.bench import find_benchmarks
from kvlink_rag.cli.main import main
from kvlink_rag.compare.baselines import Baselines
from kvlink_rag.snapshots.kept_runs import PrefixCache

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import measuring  # noqa: E402
import tier  # noqa: E402
import ttft  # noqa: E402
import ways  # noqa: E402
from asked import load_asked  # noqa: E402
from shapes import words  # noqa: E402


def last_line(script: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark in this process, which has torch loaded already; its JSON."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [script, *arguments, "--threads", "1"])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    found = json.loads(out.getvalue().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_ttft(tmp_path: Path) -> None:
    figure = tmp_path / "figure"
    found = last_line(
        *("ttft.py", "--shape", "tiny", "--dtype", "bfloat16", "--rounds", "1"),
        *("--sizes", "2x16", "3x24", "--codecs", "exact", "int8", "--places", "cold", "ram"),
        *("--ways", "full", "forward", "prefix", "naive", "cacheblend", "epic"),
        *("--figure", str(figure)),
        *("--scratch", str(tmp_path)),
    )
    rows = found["rows"]
    for size, passages, tokens in (("2x16", 2, 16), ("3x24", 3, 24)):
        mine = {row_name(row): row for row in rows if row["size"] == size}
        reused = [f"reuse {c} {place}" for c in ("exact", "int8") for place in ("cold", "ram")]
        exact = [f"{way} exact cached" for way in ("naive", "cacheblend", "epic")]
        assert list(mine) == ["floor", *reused, "full", "forward", "prefix", *exact]
        for name in reused:
            row = mine[name]
            assert row["reused_tokens"] == passages * tokens
            # 5 link tokens a passage, mem_end, the question, the assistant header
            assert row["computed_tokens"] == 5 * passages + 1 + 12 + 5
            assert row.keys() >= {"layout_ms", "read_ms", "assembly_ms", "prefill_ms", "over_full"}
            assert row["ttft_reuse_s"] == row["ttft_p50_s"]
            assert row["ttft_full_s"] == mine["full"]["ttft_p50_s"]
            assert row["ttft_floor_s"] == mine["floor"]["ttft_p50_s"]
            assert row["source"] == row["place"]
            assert row["over_epic"] > 0
            assert ("target_s" in row) == (row["place"] == "cold")
        for name in ("reuse exact cold", "reuse int8 cold"):
            row, floor = mine[name], mine["floor"]["ttft_p50_s"]
            at_disk = row["snapshot_bytes"] / row["disk_s"] / 1e9
            assert row["disk_gb_per_s"] == pytest.approx(at_disk, rel=0.1, abs=1e-3)
            assert row["target_s"] == pytest.approx(1.3 * floor + row["disk_s"], abs=1e-4)
            assert row["within_target"] == (row["ttft_p50_s"] <= row["target_s"])
        context = 43 + passages * tokens + 12 + 5
        assert mine["full"]["computed_tokens"] == mine["forward"]["computed_tokens"] == context
        assert mine["full"]["attention"] == "sdpa"
        assert mine["prefix"]["computed_tokens"] == context - (43 + tokens) // 16 * 16
        assert mine["naive exact cached"]["computed_tokens"] == 12 + 5
        blended = -(-15 * passages * tokens // 100)
        assert mine["cacheblend exact cached"]["computed_tokens"] == 12 + 5 + blended
        assert mine["epic exact cached"]["computed_tokens"] == 12 + 5 + 16 * passages
        assert mine["full"]["over_full"] == mine["floor"]["over_floor"] == 1
    sizes = {row["codec"]: row["snapshot_bytes"] for row in rows if row["way"] == "reuse"}
    assert sizes["int8"] < sizes["exact"]
    assert figure.with_suffix(".png").stat().st_size > 1000
    assert "<svg" in figure.with_suffix(".svg").read_text()


def test_groups_of_sizes() -> None:
    assert ttft.expanded(["paper", "2x16", "10x200"]) == [
        "10x100", "10x200", "10x300", "10x400", "10x500", "2x16"]  # fmt: skip
    assert ttft.expanded(["passages"]) == ["5x200", "20x200", "40x200"]


def test_full_prefill_is_transformers_own_generate(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", torch.float32)
    laid = Baselines(model).layout(model.prompt([Document("The harbour of Orvale.")], "where?"))
    asked: list[dict[str, Any]] = []
    own = model.backbone.model.generate

    def noted(**arguments: Any) -> Any:
        asked.append(arguments)
        assert model.backbone.config._attn_implementation == "sdpa"
        return own(**arguments)

    monkeypatch.setattr(model.backbone.model, "generate", noted)
    _, generated = ttft.generate(model, laid)
    _, forward = ttft.bare_forward(model, laid)
    assert asked[0]["max_new_tokens"] == 1
    assert asked[0]["input_ids"].tolist() == [laid.token_ids.tolist()]
    torch.testing.assert_close(generated, forward)
    with pytest.raises(SystemExit, match="no figures: forward does not give the full prefill"):
        ttft.same(model, "forward", forward.roll(1), generated)


def row_name(row: dict[str, str]) -> str:
    return " ".join(row[part] for part in ("way", "codec", "place") if part in row)


def test_cold_files_are_cold(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 * mmap.PAGESIZE + 5))
    assert measuring.resident_pages(path) == 21
    measuring.make_cold([path])
    assert measuring.resident_pages(path) == 0
    path.read_bytes()
    assert measuring.resident_pages(path) == 21
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) >= 0  # a page that is mapped cannot be dropped
        with pytest.raises(SystemExit, match="no figures: 1 of 1 files stay in memory"):
            measuring.make_cold([path])


def test_no_figures_where_reuse_is_wrong(
    make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", torch.float32)
    documents = [Document("The harbour of Orvale."), Document("The cranes of Tarn.")]
    prompt = model.prompt(documents, "where?")
    laid = ways.Laid(model, tmp_path / "s", documents, "exact")
    ways.check(model, prompt, laid.at("cached"))
    assert ways.first_token(model, prompt, laid.at("ram")).snapshots_found == 2
    plain = kvlink_rag.engine.backbone.Backbone.rotary
    with monkeypatch.context() as patch:
        patch.setattr(
            kvlink_rag.engine.backbone.Backbone, "rotary", lambda self, at: plain(self, at + 1)
        )
        with pytest.raises(SystemExit, match="no figures: reuse does NOT equal"):
            ways.check(model, prompt, laid.at("cached"))
    laid.store.delete(laid.source.key(laid.passages[0]))
    with pytest.raises(SystemExit, match="no figures: a snapshot was encoded, not read"):
        ways.first_token(model, prompt, replace(laid.at("ram"), snapshots=laid.source))
    reuse = replace(laid.at("ram"), prefix=PrefixCache())
    ways.first_token(model, prompt, laid.at("ram"))
    with pytest.raises(SystemExit, match="no figures: reuse did not take the path it claims"):
        ways.first_token(model, prompt, reuse)


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert measuring.percentile(values, 0.95) == 95
    assert measuring.percentile(values, 1.0) == 100
    assert measuring.percentile([3.0], 0.5) == 3
    assert measuring.percentile([2.0, 1.0], 0.5) == 1


def test_the_command_line_finds_and_runs_benchmarks(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    listed = capfd.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == sorted(find_benchmarks())
    assert "ttft" in listed
    assert "shapes" not in listed
    assert main(["bench", "ttft", "--help"]) == 0
    assert "--random-weights" in capfd.readouterr().out
    assert main(["bench", "nope"]) == 1
    assert "expected one of" in capfd.readouterr().err


TINY = ("--shape", "tiny", "--dtype", "float32", "--rounds", "1")


def test_answers(tmp_path: Path) -> None:
    """Three questions over two passages, one of them asked over its own two retrieved ones."""
    rows = [
        {
            "question": f"What is {i}?",
            "answers": [f"answer{i}"],
            "ctxs": [{"title": f"T{i}", "text": f"It is answer{i}.", "isgold": True}],
        }
        for i in range(3)
    ]
    rows[1]["ctxs"] += [{"title": "T", "text": "It is answer1, too."}]  # unanswerable: left out
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.jsonl"
    found = last_line(
        *("answers.py", "--shape", "tiny", "--data", str(data), "--documents", "2"),
        *("--modes", "full,closed,reuse,reuse:0", "--tokens", "3", "--out", str(out)),
    )["rows"]
    counts = {(row["gold"], row["mode"]): row["questions"] for row in found}
    with_links = [(True, mode) for mode in ("full", "closed", "reuse", "reuse:0")]
    without = [(False, mode) for mode in ("full", "reuse", "reuse:0")]
    assert counts == dict.fromkeys(with_links, 3) | dict.fromkeys(without, 2)
    nll = {row["mode"]: row["value"] for row in found if row["gold"] and row["score"] == "nll"}
    assert len(set(nll.values())) == len(nll)
    assert len(out.read_text().splitlines()) == 4 * 3 + 3 * 2


def test_end_to_end(saved_pair: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [
        {
            "question": f"What is harbour {i}?",
            "answers": [f"answer{i}"],
            "ctxs": [{"title": f"Harbour {i}", "text": f"Harbour {i} is answer{i}."}],
        }
        for i in range(5)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, embedder = map(str, saved_pair)
    found = last_line(
        *("end_to_end.py", "--model", model, "--embedder", embedder, "--data", str(data)),
        *("-k", "5", "--tokens", "3", "--first", "1", "--modes", "full,reuse"),
    )["rows"]
    assert [(row["mode"], row["questions"], row["recall"]) for row in found] == [
        ("full", 4, 1.0),
        ("reuse", 4, 1.0),
    ]
    assert all(row["ttft_ms"] > 0 for row in found)


def test_countries(saved_pair: tuple[Path, Path]) -> None:
    model, embedder = map(str, saved_pair)
    given = ("--model", model, "--embedder", embedder, "--passages", "1", "2", "--tokens", "1")
    rows = last_line("countries.py", *given)["rows"]
    assert [(row["mode"], row["passages"], row["of"]) for row in rows] == [
        (mode, k, 10) for mode in ("reuse", "full") for k in (1, 2)
    ]
    assert all(row["right"] == 0 for row in rows)  # a byte is no answer


def questions(path: Path) -> Path:
    """Three questions, each with its passage and another's, in a file."""
    facts = {"Orvale": "1911", "Marnik": "1754", "Teldon": "1620", "Velt": "1801"}
    texts = [{"title": town, "text": f"{town} was built in {at}."} for town, at in facts.items()]
    rows = [
        {
            "question": f"When was {text['title']} built?",
            "answers": [facts[text["title"]]],
            "ctxs": [text | {"isgold": True}, texts[-1] | {"isgold": False}],
        }
        for text in texts[:3]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(saved_pair: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """Options of a tiny pair, and of questions for it."""
    options = dict(zip(("--model", "--embedder"), map(str, saved_pair), strict=True))
    options["--data"] = str(questions(tmp_path / "questions.jsonl"))
    return [word for pair in options.items() for word in pair]


def test_questions_are_of_the_file_or_about_countries(tmp_path: Path) -> None:
    given = argparse.Namespace(data=str(questions(tmp_path / "q.jsonl")), questions=2)
    documents, found = load_asked(given)
    assert [document.title for document in documents] == ["Orvale", "Velt", "Marnik", "Teldon"]
    assert [(q.answers, q.gold) for q in found] == [(("1911",), ("0",)), (("1754",), ("2",))]
    documents, found = load_asked(argparse.Namespace(data=None, questions=4))
    assert len(documents) > 200
    assert len(found) == 4


def test_quality(asked: list[str]) -> None:
    given = ["--questions", "2", "--tokens", "3", "--ways", "epic"]
    rows = last_line("quality.py", *asked, *given)["rows"]
    mine = {f"{row['way']} {row['codec']}": row for row in rows}
    assert list(mine) == ["reuse exact", "reuse bf16", "reuse int8", "reuse int4", "reuse fp8",
                          "full exact", "epic exact"]  # fmt: skip
    assert all(row["questions"] == 2 and 2 <= row["places"] <= 8 for row in rows)
    assert (mine["full exact"]["divergence"], mine["full exact"]["top1"]) == (0, 1)
    assert 0 < mine["reuse bf16"]["divergence"] < mine["reuse int8"]["divergence"]
    assert mine["reuse int8"]["divergence"] < mine["reuse int4"]["divergence"] < 1
    assert mine["reuse int8"]["reference"] == "reuse exact"
    assert mine["epic exact"]["divergence"] > 0


def test_order(asked: list[str], tmp_path: Path) -> None:
    figure = tmp_path / "figure"
    given = ["--documents", "4", "--questions", "3", "--figure", str(figure)]
    rows = last_line("order.py", *asked, *given)["rows"]
    score, by_id = rows
    assert [(row["documents"], row["order"], row["questions"]) for row in rows] == [
        (4, "score", 3), (4, "id", 3)]  # fmt: skip
    assert by_id["kept_share"] > score["kept_share"]
    for row in rows:  # both are the same tokens
        assert row["computed_tokens"] + row["kept_tokens"] == pytest.approx(
            score["computed_tokens"] + score["kept_tokens"], abs=0.2
        )
    assert "<svg" in figure.with_suffix(".svg").read_text()


def test_load(tmp_path: Path) -> None:
    rows = last_line("load.py", *TINY, "--sizes", "2x16", "--scratch", str(tmp_path))["rows"]
    assert [(row["codec"], row["place"]) for row in rows] == [
        (codec, place) for codec in ("exact", "int8") for place in ("cached", "cold")
    ]
    for row in rows:
        assert (
            row["cache_bytes"] == 2 * 16 * 2 * 2 * 32 * 4
        )  # tokens, k and v, layers, dim, float32
        assert row["both_ms"] > 0
        least, most = row["memcpy_ms"] - 0.0006, row["memcpy_ms"] + 0.0006  # it is rounded
        assert (row["over_memcpy"] - 0.0006) * least <= row["both_ms"] + 0.0006
        assert (row["over_memcpy"] + 0.0006) * most >= row["both_ms"] - 0.0006


def test_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the servers that are here; a folder always."""
    for name in tier.S3_SETTINGS:
        monkeypatch.delenv(name, raising=False)  # as it was, afterwards
    monkeypatch.delenv(tier.SECRET, raising=False)
    places = ["folder"]
    if shutil.which("redis-server") and importlib.util.find_spec("redis"):
        places.append("redis")
    if importlib.util.find_spec("moto") and importlib.util.find_spec("obstore"):
        places.append("s3")
    asked = ("--sizes", "2x16", "--codecs", "int8", "--places", *places)
    rows = last_line("tier.py", *TINY, *asked, "--scratch", str(tmp_path))["rows"]
    assert [row["place"] for row in rows] == ["cached", "cold", *places, "encode"]
    for row in rows:
        assert (row["encode_ms"] > 0) == (row["place"] == "encode") == ("even_mb_per_s" in row)
        assert row["ttft_p95_s"] >= row["ttft_p50_s"] > 0
        assert row["ttft_p50_s"] * 1e3 > row["read_ms"] + row["encode_ms"] - 0.1


def test_decode(tmp_path: Path) -> None:
    found = last_line("decode.py", *TINY, "--sizes", "2x16", "--new-tokens", "3")
    row = found["rows"][0]
    assert row["new_tokens"] == 3
    assert row["reuse_tokens_per_s"] > 0
    assert row["full_tokens_per_s"] > 0


def test_answer(tmp_path: Path) -> None:
    found = last_line("answer.py", *TINY, "--sizes", "2x16", "--new-tokens", "3")
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["reuse", "full", "int8"]  # and llama.cpp's, where it is
    for row in rows.values():
        assert 0 < row["first_s"] < row["answer_s"]
        assert row["tokens_per_s"] > 0
    assert rows["reuse"]["answer_over_reuse"] == rows["reuse"]["rate_over_reuse"] == 1


def test_gpu_goes_through_its_steps_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--shapes", "tiny", "--dtype", "float32", "--rounds", "2", "--device", "cpu"]
    arguments += ["--sizes", "2x16", "3x24", "--codecs", "exact", "int8", "--new-tokens", "3"]
    found = last_line("gpu.py", *arguments, "--scratch", str(tmp_path))
    ways = [("full", None, None, None)]
    ways += [
        ("reuse", codec, place, forward)
        for codec in ("exact", "int8")
        for place in ("gpu", "pinned", "cached")
        for forward in ("graphs", "plain")
    ]
    for size, computed in (("2x16", 5 * 2 + 1 + 12 + 5), ("3x24", 5 * 3 + 1 + 12 + 5)):
        mine = [row for row in found["rows"] if row["size"] == size]
        names = ("way", "codec", "place", "forward")
        assert [tuple(row.get(name) for name in names) for row in mine] == ways
        assert all(row["computed_tokens"] == computed for row in mine[1:])
        assert all(0 < row["ttft_p50_ms"] <= row["ttft_p95_ms"] for row in mine)
    forwards = [row["forward"] for row in found["decode"]]
    assert forwards == ["graphs", "plain", "transformers"] * 2
    assert all(row["tokens_per_s"] > 0 for row in found["decode"])


def test_gpu_has_no_figures_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit, match="no figures: found no CUDA device"):
        last_line("gpu.py")


def test_gpu_has_no_figures_of_a_forward_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvlink_rag.engine.workspaces.Workspaces, "take", lambda *arguments: None)
    arguments = ["--shapes", "tiny", "--dtype", "float32", "--rounds", "1", "--device", "cpu"]
    with pytest.raises(SystemExit, match="no figures: the forward was not the one of 'graphs'"):
        last_line("gpu.py", *arguments, "--sizes", "2x16", "--scratch", str(tmp_path))


def test_sizes_are_of_the_models_own_tokens(saved_pair: tuple[Path, Path], small: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in (str(saved_pair[0]), small):
        encode = KVLinkModel.from_pretrained(name, device="cpu").tokenizer.encode
        texts = [words(n, generator, encode) for n in (1, 12, 200, 200)]
        assert [len(encode(text)) for text in texts] == [1, 12, 200, 200]
        assert len(set(texts)) == 4
    found = last_line("ttft.py", "--model", str(saved_pair[0]), "--sizes", "2x40", "--rounds", "1")
    reuse = next(row for row in found["rows"] if row["way"] == "reuse")
    assert 80 <= reuse["reused_tokens"] <= 90


def test_throughput() -> None:
    arguments = ["--sizes", "2x16", "--askers", "1", "2", "--questions", "3", "--codec", "int8"]
    rows = last_line("throughput.py", *TINY, *arguments, "--load", "0.5")["rows"]
    assert [(row["askers"], row["questions"]) for row in rows[:2]] == [("1", 3), ("2", 3)]
    assert rows[2]["askers"].endswith(" a second")
    assert rows[0]["over_one"] == 1
    assert all(0 < row["ttft_p50_s"] <= row["ttft_p95_s"] for row in rows)


def test_retrieval_and_scale() -> None:
    arguments = ["--counts", "2000", "--dimension", "16", "--queries", "5"]
    rows = last_line("retrieval.py", *arguments)["rows"]
    assert [(row["count"], row["search"]) for row in rows] == [(2000, "exact"), (2000, "ivf")]
    assert rows[0]["recall_at_10"] == 1
    assert rows[1]["recall_at_10"] > 0.8
    arguments = ["--passages", "1200", "--dimension", "16", "--queries", "5", "--search", "ivf"]
    row = last_line("scale.py", *arguments)["rows"][0]
    assert (row["passages"], row["search"]) == (1200, "ivf")
    arguments = ["--passages", "600", "--dimension", "16", "--queries", "5", "--snapshots"]
    row = last_line("scale.py", *arguments)["rows"][0]
    assert (row["passages"], row["search"]) == (600, "exact")
    assert row["search_p50_ms"] > 0
    assert row["most_files_in_a_folder"] <= 256 + 1  # 256 folders, and tmp


def test_encode() -> None:
    arguments = ["--passages", "4", "--tokens", "16", "--rounds", "1", "--many", "50"]
    found = last_line("encode.py", "--shape", "tiny", *arguments)
    assert found["memory"]["passages"] == 50
    assert found["rows"][0]["encode_over_plain"] > 0
