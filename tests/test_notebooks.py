"""The notebooks run offline on a tiny random pair, and what they show is so.

Each runs with one more cell, which prints what its variables hold; the claims are checked here.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import byte_spec

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
PASSAGES = 10  # in every prompt


def _load_runner() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks_run", NOTEBOOKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = _load_runner()


@pytest.fixture(scope="module")
def pair(
    saved_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The tiny pair, with slots for no more passages than the prompts have."""
    lm = shutil.copytree(saved_pair[0], tmp_path_factory.mktemp("pair") / "lm")
    (lm / "kvlink.json").write_text(byte_spec(slots=PASSAGES).to_json())
    return lm, saved_pair[1]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path]) -> None:
    """What a kernel inherits: the tiny pair, one thread, and no way out."""
    for name, directory in zip(("KVLINK_MODEL", "KVLINK_EMBEDDER"), pair, strict=True):
        monkeypatch.setenv(name, str(directory))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(name: str, directory: Path, facts: str) -> Any:
    """`facts`, an expression, after all cells of a notebook; its outputs are checked on the way."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    cell = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({facts}))")
    notebook.cells.append(cell)
    runner.execute(notebook, directory)
    last = notebook.cells.pop()
    assert runner.problems(notebook) == []
    return json.loads(last.outputs[-1].text)


def test_your_documents(tmp_path: Path) -> None:
    facts = run(
        "01_your_documents.ipynb",
        tmp_path,
        """{
        "documents": len(documents),
        "reports": [report.to_dict() for report in (first, second, third)],
        "traces": [answer.trace.to_dict() for answer in answers],
        "tokens": [
            sum(len(rag.model.passage_tokens(hit.document)) for hit in answer.hits)
            for answer in answers
        ],
        "sources": sorted({h.document.metadata["source"] for a in answers for h in a.hits}),
        "holds": verdict.holds,
        "again": [again.text, answers[0].text, again.trace.to_dict()],
        "computed": [reused.computed_tokens, full.computed_tokens, full.reused_tokens],
        }""",
    )
    first, second, third = facts["reports"]
    # three kinds of files, and no document of the folder is lost
    assert first["files"] == 7
    assert first["added"] == first["encoded"] == first["passages"] >= facts["documents"]
    assert (second["added"], second["encoded"]) == (0, 0)
    assert second["unchanged"] == first["added"]
    # a token a byte, a note may be two passages
    assert third["added"] == 1 <= third["removed"] <= 2
    assert third["unchanged"] == first["added"] - third["removed"]
    assert [trace["passages"] for trace in facts["traces"]] == [PASSAGES] * len(facts["traces"])
    assert [trace["reused_tokens"] for trace in facts["traces"]] == facts["tokens"]
    assert all(source.startswith("my-documents/") for source in facts["sources"])
    assert facts["holds"]
    said, before, trace = facts["again"]
    assert said == before
    assert (trace["snapshots_encoded"], trace["snapshots_found"]) == (PASSAGES, 0)
    computed, everything, reused = facts["computed"]
    assert computed + facts["tokens"][0] == everything
    assert reused == 0


SWAP = """{
    "recognised": [part.document.text for part in parts if isinstance(part, Passage)],
    "tokens": sum(
        len(model.passage_tokens(part.document)) for part in parts if isinstance(part, Passage)
    ),
    "oracle": model.generate(parts, mode="masked", max_new_tokens=32),
    "length": len(model.layout(parts)),
    "holds": verdict.holds,
    "answers": [answers[label, q.question] for label in answers_of for q in questions],
    "times": [ttft[label, q.question] for label in answers_of for q in questions],
    **extra,
}"""


def check_swap(facts: Any) -> None:
    """The swap reused every retrieved text, and equals the oracle."""
    assert sorted(facts["recognised"]) == sorted(facts["retrieved"])
    assert len(facts["recognised"]) == PASSAGES
    assert facts["cached"] >= facts["tokens"] > 0
    assert facts["prompt"] == facts["length"]
    assert facts["holds"]
    assert facts["said"] == facts["oracle"]
    assert all(answer.strip() for answer in facts["answers"])
    assert len(facts["times"]) == 9


def test_langchain(tmp_path: Path) -> None:
    extra = """{
        "retrieved": [document.page_content for document in found],
        "said": message.content,
        "prompt": usage["input_tokens"],
        "cached": usage["input_token_details"]["cache_read"],
    }"""
    facts = SWAP.replace("answers_of", "CHAINS").replace("extra", extra)
    check_swap(run("02_langchain.ipynb", tmp_path, facts))


def test_llama_index(tmp_path: Path) -> None:
    extra = """{
        "retrieved": [node.text for node in after.retrieve(questions[1].question)],
        "said": calls[-1].response.message.content,
        "prompt": usage["prompt_tokens"],
        "cached": usage["cached_tokens"],
    }"""
    facts = SWAP.replace("answers_of", "ENGINES").replace("extra", extra)
    check_swap(run("03_llama_index.ipynb", tmp_path, facts))


def test_inside_kvlink(tmp_path: Path) -> None:
    facts = run(
        "04_inside_kvlink.ipynb",
        tmp_path,
        """{
        "spans": [[span.start, span.stop, span.document is not None] for span in prompt.spans],
        "names": names,
        "seen": int(seen.sum()),
        "differences": differences,
        "holds": [verdict.holds, bare_verdict.holds],
        "links": [model.spec.links_per_passage, bare.spec.links_per_passage],
        "shares": shares.sum(0).tolist(),
        "far": far,
        }""",
    )
    # the rule, counted: a passage's token sees itself and those before it in the passage, any
    # other token itself and all before it
    expected = sum(
        at - (start if is_passage else 0) + 1
        for start, stop, is_passage in facts["spans"]
        for at in range(start, stop)
    )
    assert facts["seen"] == expected
    assert facts["names"].count("question") == 1
    assert [name for name in facts["names"] if name.startswith(("passage", "links"))] == [
        f"{what} {number}" for number in (1, 2, 3) for what in ("passage", "links")
    ]
    differences = facts["differences"]
    ordinary = differences.pop("ordinary full prefill (no mask)")
    assert len(differences) == 4
    assert max(differences.values()) < 1e-4
    assert ordinary > 1e-3  # so the other four could have been off
    assert facts["holds"] == [True, True]
    assert facts["links"][0] > facts["links"][1] == 0
    assert facts["shares"] == pytest.approx([1] * len(facts["shares"]), abs=1e-4)
    assert facts["far"]["with link tokens"] != facts["far"]["without"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_clean(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    assert runner.problems(notebook) == []
    normal = copy.deepcopy(notebook)
    runner.normalise(normal)
    assert normal == notebook, "run: make notebooks"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run: make notebooks"
    assert "Shiyu-Lab/Llama1B-KVLink5" in notebook.cells[0].source


def test_there_are_four() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04"]


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ({"output_type": "stream", "name": "stdout", "text": "at /home/me/data"}, "absolute path"),
        ({"output_type": "stream", "name": "stdout", "text": "C:\\Users\\me"}, "absolute path"),
        (
            {"output_type": "display_data", "data": {"text/html": "x='/tmp/a/b'"}, "metadata": {}},
            "absolute path",
        ),
        ({"output_type": "stream", "name": "stderr", "text": "careful"}, "a warning"),
        (
            {"output_type": "error", "ename": "E", "evalue": "no", "traceback": ["no"]},
            "an error",
        ),
        ({"output_type": "stream", "name": "stdout", "text": "x" * 300_000}, "bytes"),
    ],
)
def test_what_is_not_clean_is_found(output: dict[str, Any], what: str) -> None:
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.from_dict(output)])
    (found,) = runner.problems(nbformat.v4.new_notebook(cells=[cell]))
    assert what in found


def test_relative_paths_and_addresses_are_clean() -> None:
    text = "my-documents/a.txt and https://arxiv.org/abs/2502.16002, text/plain, 3 / 4, ms/token"
    output = nbformat.v4.new_output("stream", text=text)
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    assert runner.problems(nbformat.v4.new_notebook(cells=[cell])) == []
