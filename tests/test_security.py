"""No code from data: nothing is pickled, nothing a directory names is run, nothing is left open."""

from __future__ import annotations

import ast
import json
import pickle
import pickletools
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_spec, byte_tokenizer, random_model
from trust import SMALL, SNAPSHOT, as_documents, open_tiny

import kvlink_rag
from kvlink_rag import Document, KVLinkModel
from kvlink_rag.errors import ConfigError, KVLinkError

PACKAGE = Path(kvlink_rag.__file__).parent
INTEGRATIONS = PACKAGE.parent / "integrations"
ROWS = [(f"id{n}", f"Town {n}", f"Town {n} has a harbour.") for n in range(6)]

watched: list[str] = []
watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event in ("pickle.find_class", "os.system", "os.exec"):
        watched.append(f"{event} {arguments[:2]}")


sys.addaudithook(_watch)


@pytest.fixture
def unpickling() -> Iterator[list[str]]:
    """What Python reports of classes looked up by unpickling, meanwhile."""
    global watching
    watched.clear()
    watching = True
    yield watched
    watching = False


def lived_through(directory: Path) -> None:
    """Everything that is ever written, in one collection."""
    with open_tiny(directory, size_limit=4 * SNAPSHOT) as rag:
        rag.add([Document("A text.", title="T", id="one", metadata={"a": [1, {"b": None}]})])
        rag.add(as_documents(ROWS))
        rag.update(as_documents([("id1", "Town", "Town 1 has a mill.")]))
        rag.delete(["id2"])
        for _ in range(2):
            rag.ask("Town?", k=5, max_new_tokens=2)
        next(iter((directory / "snapshots").rglob("*.safetensors"))).write_bytes(b"x" * 100)
        rag.check(fix=True)
        rag.save_index()


def test_nothing_is_unpickled(tmp_path: Path, unpickling: list[str]) -> None:
    lived_through(tmp_path / "c")
    with open_tiny(tmp_path / "c") as rag:
        rag.ask("Town?", max_new_tokens=2)
        rag.check(fix=True)
    assert unpickling == []
    pickle.loads(pickle.dumps(Path("x")))  # noqa: S301 - the watch works
    assert unpickling


def test_no_file_and_no_row_holds_a_pickle(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    lived_through(directory)
    kinds = set()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if data.startswith(b"SQLite format 3\0"):
            kinds.add("database")
            rows_hold_no_pickle(path)
        elif data:
            kinds.add("sealed")
            size = int.from_bytes(data[:8], "little")
            assert json.loads(data[8 : 8 + size])["__metadata__"]["format"].startswith("kvlink-")
            assert not is_pickle(data), path
        else:
            kinds.add("empty")  # locks
    assert kinds == {"database", "sealed", "empty"}


def rows_hold_no_pickle(path: Path) -> None:
    connection = sqlite3.connect(path)
    names = [n for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
    assert names
    for name in names:
        cursor = connection.execute(f"SELECT * FROM {name}")
        columns = [column[0] for column in cursor.description]
        for row in cursor:
            for column, value in zip(columns, row, strict=True):
                assert isinstance(value, int | float | str | bytes | None)
                assert not isinstance(value, bytes) or (name, column) == ("documents", "embedding")
                assert not is_pickle(value.encode() if isinstance(value, str) else value), value
    connection.close()


def is_pickle(data: object) -> bool:
    """Whether Python could unpickle this: its opcodes run to STOP, and do more than that."""
    if not isinstance(data, bytes):
        return False
    try:
        return len(list(pickletools.genops(data))) > 1
    except Exception:
        return False


def test_the_pickle_detector_works() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_pickle(pickle.dumps({"a": Path("x")}, protocol))
        assert is_pickle(pickle.dumps(7, protocol))
    assert not is_pickle(b"Town 1 has a mill.")


def sources() -> list[Path]:
    return [
        *PACKAGE.rglob("*.py"),
        *(p for p in INTEGRATIONS.rglob("*.py") if "tests" not in p.parts),
    ]


def test_the_source_runs_no_data() -> None:
    """No pickle, no eval, no torch.load but with `weights_only`, no code of a repository."""
    assert len(sources()) > 60
    for path in sources():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given: dict[str | None, str] = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "os.system", "yaml.load"), path
            assert given.get("trust_remote_code", "False") == "False", path
            assert given.get("allow_pickle", "False") == "False", path
            if called == "torch.load":
                assert given.get("weights_only") == "True", path
            if re.fullmatch(r"Auto\w+\.from_pretrained", called):
                assert "training" in path.parts or "trust_remote_code" in given, path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model directory that brings code of its own, which would leave a mark."""
    directory = tmp_path / "model"
    random_model("llama", torch.float32, **SMALL).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "kvlink.json").write_text(byte_spec().to_json())
    code = (
        f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Config: pass\nModel = Tokenizer = Config\n"
    )
    (directory / "evil.py").write_text(code)
    for name, found in {
        "config.json": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    }.items():
        fields = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**fields, "auto_map": found}))
    return directory


@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_code_of_a_model_directory_is_not_run(saved: Path, tmp_path: Path, kind: str) -> None:
    """Nor is anyone asked whether it should be."""
    if kind == "unknown":
        fields = json.loads((saved / "config.json").read_text())
        fields.update(model_type="evil", architectures=["Evil"])
        (saved / "config.json").write_text(json.dumps(fields))
        with pytest.raises(KVLinkError):
            KVLinkModel.from_pretrained(saved, device="cpu")
    else:
        KVLinkModel.from_pretrained(saved, device="cpu")
    assert not (tmp_path / "mark").exists()


class Bomb:
    def __reduce__(self) -> Any:
        return (open, ("kvlink-bomb", "w"))


def test_weights_that_are_a_pickle_are_not_read(
    saved: Path, tmp_path: Path, unpickling: list[str]
) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, saved / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        KVLinkModel.from_pretrained(saved, device="cpu")
    assert not any("open" in line for line in unpickling)


def test_an_adapter_beside_weights_is_refused(saved: Path) -> None:
    """transformers would load it over other weights than those whose digest names snapshots."""
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge"):
        KVLinkModel.from_pretrained(saved, device="cpu")


def test_an_unpacked_store_with_planted_rows(tmp_path: Path) -> None:
    """Through the collection: a row that names a file outside is a miss, and the file stays."""
    directory, victim = tmp_path / "c", tmp_path / "victim.safetensors"
    with open_tiny(directory) as rag:
        rag.add(as_documents(ROWS))
        shutil.copy(next((directory / "snapshots").rglob("*.safetensors")), victim)
    names = [str(victim), "../../victim.safetensors", "../catalog.sqlite", "", "/etc/passwd", None]
    connection = sqlite3.connect(directory / "snapshots" / "cache.db")
    for rowid, name in enumerate(names, 1):
        connection.execute("UPDATE Cache SET filename = ? WHERE rowid = ?", (name, rowid))
    connection.execute("UPDATE Cache SET mode = 4, value = ? WHERE rowid = 6", (pickle.dumps(1),))
    connection.commit()
    connection.close()
    with open_tiny(directory) as rag:
        answer = rag.ask("Town?", k=6, max_new_tokens=1)
        assert answer.trace.snapshots_encoded == 6
        rag.check(fix=True)
        assert rag.check() == []
        assert len(rag) == 6
    assert victim.exists()
