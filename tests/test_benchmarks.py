"""The benchmarks run whole, on a tiny shape, and end in one JSON object with the promised keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TTFT_KEYS = {
    "model",
    "passages",
    "tokens_per_passage",
    "dtype",
    "source",
    "ttft_reuse_s",
    "ttft_full_s",
    "ttft_floor_s",
    "layout_ms",
    "read_ms",
    "assembly_ms",
    "prefill_ms",
}


def last_line(script: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, str(BENCHMARKS / script), "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ttft(dtype: str) -> None:
    sizes = ["--sizes", "2x16", "3x8"]
    found = last_line("ttft.py", "--shape", "tiny", "--dtype", dtype, "--rounds", "2", *sizes)
    rows = found["rows"]
    assert isinstance(rows, list)
    assert [(r["passages"], r["tokens_per_passage"]) for r in rows] == [(2, 16), (3, 8)]
    for row in rows:
        assert row.keys() >= TTFT_KEYS
        assert row["reused_tokens"] == row["passages"] * row["tokens_per_passage"]
        # 5 link tokens a passage, mem_end, the question, the assistant header
        assert row["computed_tokens"] == 5 * row["passages"] + 1 + 12 + 5
        assert "random weights" in row["model"]


def test_encode() -> None:
    arguments = ["--passages", "4", "--tokens", "16", "--rounds", "1", "--many", "50"]
    found = last_line("encode.py", "--shape", "tiny", *arguments)
    assert found["memory"]["passages"] == 50  # type: ignore[index]
    assert found["rows"][0]["encode_over_plain"] > 0  # type: ignore[index]
