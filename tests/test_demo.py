"""The demonstration on the bundled files: what `make demo` shows is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlink_rag import KVLinkRAG
from kvlink_rag.cli.demo import ASKED, load_documents, load_examples, run
from kvlink_rag.disk.model_files import BUNDLED_DIRECTORY
from kvlink_rag.errors import ConfigError

bundled = pytest.mark.skipif(
    not (BUNDLED_DIRECTORY / "lm" / "model.safetensors").exists(),
    reason="the bundled model is not there; make it with: make train-small",
)


@bundled
def test_the_demo_marks_its_answers_and_reuse_is_faster(tmp_path: Path) -> None:
    said: list[str] = []
    with KVLinkRAG.open(tmp_path) as rag:
        found = run(rag, runs=1, say=said.append)
        again = run(rag, runs=1, say=said.append)
    assert len(found["answers"]) == sum(ASKED.values())
    assert {answer["kind"] for answer in found["answers"]} == set(ASKED)
    assert found["right"] == sum(answer["right"] for answer in found["answers"])
    assert found["right"] >= 7
    for answer in found["answers"]:
        last = answer["answer"].split()[-1].lower()
        assert answer["right"] <= (last in answer["said"].lower())
        assert (
            f"{'[right]' if answer['right'] else 'WRONG, expected: ' + answer['answer']}"
            in "\n".join(said)
        )
    long = found["ttft"][1]
    assert long["tokens"] > 3000
    assert long["reuse_ms"] < long["full_ms"]
    assert found["disk"]["snapshots"] > 10**6
    assert again["indexed"]["tokens"] == 0
    assert [a["said"] for a in again["answers"]] == [a["said"] for a in found["answers"]]


@bundled
def test_the_bundled_questions_rest_on_bundled_documents() -> None:
    ids = {document.id for document in load_documents(BUNDLED_DIRECTORY)}
    for example in load_examples(BUNDLED_DIRECTORY):
        assert set(example.gold) <= ids
        assert bool(example.gold) == (example.kind != "absent")


def test_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"documents\.jsonl is missing"):
        load_documents(tmp_path)
