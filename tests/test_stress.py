"""Short runs of the stress scripts (`make stress`, `make soak`), and that they can fail."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trust
from stress_crash import ROOT, Change, count_lines, ended, fork
from trust import as_documents, document_of, open_tiny

ROWS = [document_of(random.Random(n), name.lower()) for n, name in enumerate(trust.NAMES)]

# What an addition runs through, each of which must be killed at some time.
WRITERS = [
    *(f"collection/catalog/{name}.py" for name in ("catalog", "connection", "schema", "writing")),
    *(f"snapshots/store/{name}.py" for name in ("checking", "keys", "store", "table")),
    *("disk/atomic_files.py", "disk/checked_file.py"),
    *("retrieval/vector_index.py", "snapshots/snapshot.py"),
]

SCRIPTS = {
    "stress_crash": ["--kills", "16", "--seed", "3"],
    "stress_faults": ["--cases", "60", "--seed", "3"],
    "soak": ["--minutes", "0.07", "--processes", "2"],
    "stress_serve": ["--minutes", "0.05", "--clients", "6"],
}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """The last line of each script, run in one process (it forks, and imports take seconds)."""
    code = "\n".join(f"import {s}; print('status', {s}.main({a}))" for s, a in SCRIPTS.items())
    memory = Path("/dev/shm")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if memory.is_dir() and os.access(memory, os.W_OK):
        environment["TMPDIR"] = str(memory)  # SQLite waits for the disk at every change
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("status False") == len(SCRIPTS), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(SCRIPTS, map(json.loads, lines), strict=True))


def test_kills(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["stress_crash"]["kills"] == 16
    assert reports["stress_crash"]["failures"] == 0


def test_faults(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["stress_faults"]["cases"] == {"damage": 60, "errors": 20, "quota": 20}
    assert reports["stress_faults"]["failures"] == 0


def test_soak(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["soak"]["failures"] == 0
    assert reports["soak"]["calls"]["ask"] > 0
    assert reports["soak"]["calls"]["change"] > 0


def test_serve(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["stress_serve"]["failures"] == 0
    assert reports["stress_serve"]["calls"]["streamed"] > 0
    assert reports["stress_serve"]["calls"]["indexed"] > 0


# What they look for, they find.


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with open_tiny(tmp_path / "c") as rag:
        rag.add(as_documents(ROWS))
    return tmp_path / "c"


def look(directory: Path, **arguments: Any) -> str:
    truth = {id: (title, text) for id, title, text in ROWS}
    with open_tiny(directory, **arguments) as rag:
        return "\n".join(trust.broken(rag, [truth], random.Random(0)))


def test_a_whole_collection_is_whole(directory: Path) -> None:
    assert look(directory) == ""


def test_a_lost_document_is_seen(directory: Path) -> None:
    connection = sqlite3.connect(directory / "catalog.sqlite")
    connection.execute("DELETE FROM documents WHERE id = 'hux'")
    connection.commit()
    connection.close()
    assert "hux: found None" in look(directory)


def test_a_wrong_vector_is_seen(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvlink_rag.retrieval.vector_index.VectorIndex.search", lambda self, vector, k: [(1, 0.5)]
    )
    assert "brute force" in look(directory)


def test_a_wrong_snapshot_is_seen(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One passage's keys under another's ids, as if nothing were compared."""
    real = kvlink_read()

    def read(path: Path, **arguments: Any) -> Any:
        found = real(path, **arguments)
        found.values.mul_(1.3)
        return found

    monkeypatch.setattr("kvlink_rag.snapshots.store.store.read_snapshot", read)
    assert "the oracle says" in look(directory) or "not the oracle's" in look(directory)


def kvlink_read() -> Any:
    from kvlink_rag.snapshots.file_format import read_snapshot

    return read_snapshot


def test_a_leaked_file_is_seen(directory: Path) -> None:
    (directory / "catalog.sqlite.0123456789abcdef.old").write_bytes(b"?")
    assert "leaked catalog.sqlite.0123456789abcdef.old" in look(directory)


def test_half_a_change_is_no_allowed_state() -> None:
    """The states of a change are those after whole transactions."""
    before = {"a": ("A", "one"), "b": ("B", "two")}
    rows = [("a", "A", "new"), ("b", "B", "new"), ("c", "C", "new")]
    states = Change("add", rows).states(before)
    assert states == [
        before,
        {"a": ("A", "new"), "b": ("B", "new")},
        {"a": ("A", "new"), "b": ("B", "new"), "c": ("C", "new")},
    ]
    assert Change("delete", ids=["a", "b"]).states(before) == [{}]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_child_is_killed_at_the_line(tmp_path: Path) -> None:
    def task() -> None:
        with open_tiny(tmp_path / "c") as rag:
            rag.add(as_documents(ROWS[:2]))

    lines = count_lines(task)
    place = max(lines, key=lambda place: lines[place])
    assert lines[place] > 2
    struck = {Path(place.rpartition(":")[0]) for place in lines}
    assert struck >= {Path(ROOT, name) for name in WRITERS}  # or no child ever ends in what writes
    shutil.rmtree(tmp_path / "c")
    assert ended(fork(lambda: count_lines(task, (place, 2)) and None)) == -9
    assert ended(fork(lambda: count_lines(task, (place, 10**9)) and None)) == 0
