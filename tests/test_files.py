"""Temporary files: locked while their writer lives, swept when it is dead."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from kvlink_rag.disk import atomic_files as files


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(path: Path, content: bytes) -> None:
    with files.replaced(path) as file:
        files.write_all(file, memoryview(content))


def test_a_replaced_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with contextlib.suppress(RuntimeError), files.replaced(path) as file:
        file.write(b"half of the ne")
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with files.temporary(tmp_path, "file") as file:
        assert list(files.abandoned(tmp_path)) == []
        assert files.temporary_for(Path(str(file.name))) == "file"
    assert names(tmp_path) == []


def test_what_a_dead_writer_left_is_found_by_name(tmp_path: Path) -> None:
    left = tmp_path / f"file.{'0' * 16}.tmp"
    for path in (left, tmp_path / f"other.{'0' * 16}.tmp", tmp_path / "x.tmp", tmp_path / "file"):
        path.touch()
    (tmp_path / "directory.tmp").mkdir()
    assert list(files.abandoned(tmp_path, "file")) == [left]
    assert len(list(files.abandoned(tmp_path))) == 3
    write(tmp_path / "file", b"new")
    assert not left.exists()
    assert len(names(tmp_path)) == 4


def test_what_is_being_swept_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / f"file.{'0' * 16}.tmp").touch()
    for _ in files.abandoned(tmp_path):
        assert list(files.abandoned(tmp_path)) == []


def test_a_writer_that_has_not_locked_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Path]] = []
    sweeper = threading.Thread(target=lambda: found.append(list(files.abandoned(tmp_path))))
    original = os.open

    def slow(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = original(path, *args, **kwargs)
        if str(path).endswith(".tmp") and not sweeper.ident:
            sweeper.start()  # between open and lock
            sweeper.join(0.2)
            assert sweeper.is_alive()
        return fd

    monkeypatch.setattr(os, "open", slow)
    with files.temporary(tmp_path, "file"):
        sweeper.join()
    assert found == [[]]


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(NotADirectoryError):
        files.private_directory(tmp_path / "link")
    left = tmp_path / f"file.{'0' * 16}.tmp"
    left.symlink_to(tmp_path / "outside")
    write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file", "link", "outside"]


def test_link_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        files.link(tmp_path / "a", tmp_path / "b")

    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # a file system without links
    with pytest.raises(FileExistsError):
        files.link(tmp_path / "a", tmp_path / "b")
    files.link(tmp_path / "a", tmp_path / "c")
    assert names(tmp_path) == ["b", "c"]
