"""`kvlink-rag serve` as a user runs it: a process of its own, from its first line to SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from kvlink_rag.cli.main import main  # noqa: E402

TEXT = "# Orvale\n\nThe harbour of Orvale was built in 1911 by the Tarn company.\n"


def test_a_server_from_its_first_line_to_its_last(
    saved_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "orvale.md").write_text(TEXT)
    pair = ["--model", str(saved_pair[0]), "--embedder", str(saved_pair[1])]
    run = [sys.executable, "-m", "kvlink_rag"]
    environment = {**os.environ, "KVLINK_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([*run, "--dir", "towns", *pair, "index", "docs"], cwd=tmp_path, check=True)
    with subprocess.Popen(
        [*run, "serve", "towns", "--port", "0", "--max-tokens", "60"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout
        assert server.stderr
        url, _, models = server.stdout.readline().partition(" serves ")
        assert "kvlink/towns, lm" in models  # of the paths only the last part
        question = {"role": "user", "content": "When was the harbour built?"}
        body = {"model": "kvlink/towns", "messages": [question], "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines)[6:])["choices"][0]["delta"]["role"] == "assistant"
            server.send_signal(signal.SIGTERM)
            rest = [line[6:] for line in lines if line]
        assert server.wait(60) == 0
        log = server.stderr.read()
    assert rest[-1] == "[DONE]"
    last = json.loads(rest[-2])
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["kvlink"]["sources"][0]["filename"] == "docs/orvale.md"
    assert "POST /v1/chat/completions 200" in log
    assert "harbour" not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "KVLINK_API_KEYS"),
        (["nowhere"], "kvlink-rag index"),
        (["--reencode"], "check --reencode"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KVLINK_API_KEYS", raising=False)
    assert main(["serve", *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_missing_extra_names_the_pip_line(tmp_path: Path) -> None:
    for package in ("starlette", "python_multipart"):
        code = (
            f"import sys; sys.modules[{package!r}] = None\n"
            "from kvlink_rag.cli.main import main; sys.exit(main(['serve']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "KVLINK_CACHE_DIR": str(tmp_path)},
        )
        assert done.returncode == 1
        assert f"{package!r}" in done.stderr
        assert "pip install 'kvlink-rag[serve]'" in done.stderr
