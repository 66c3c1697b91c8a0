"""Digests of weights: equal for equal bytes, in every process; read once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kvlink_rag.disk import digests as fingerprint
from kvlink_rag.disk.digests import module_digest, tokenizer_digest, weights_digest
from kvlink_rag.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", -1.0)  # files here are new
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were really hashed."""
    seen: list[str] = []
    original = fingerprint._sha256

    def note(file: Any) -> str:
        seen.append(Path(file.name).name)
        return original(file)

    monkeypatch.setattr(fingerprint, "_sha256", note)
    return seen


def model(path: Path, content: bytes = b"weights") -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(content)
    return path


def sharded(path: Path, names: list[str], index: str = "model.safetensors.index.json") -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(name.encode())
    weight_map = {f"tensor{n}": name for n, name in enumerate(names * 2)}
    (path / index).write_text(json.dumps({"weight_map": weight_map}))
    return path


def expected(**contents: bytes) -> str:
    lines = (f"{name}\0{hashlib.sha256(data).hexdigest()}\n" for name, data in contents.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# Weight files.


def test_the_documented_digest(tmp_path: Path) -> None:
    assert weights_digest(model(tmp_path / "m")) == expected(**{"model.safetensors": b"weights"})


def test_shards_are_those_the_index_names(tmp_path: Path) -> None:
    names = ["model-2.safetensors", "model-1.safetensors"]
    path = sharded(tmp_path / "m", names)
    (path / "consolidated.safetensors").write_bytes(b"not loaded")
    assert weights_digest(path) == expected(**{name: name.encode() for name in sorted(names)})
    (path / "model-1.safetensors").write_bytes(b"other")
    assert weights_digest(path) != expected(**{name: name.encode() for name in sorted(names)})


def test_what_transformers_would_load_comes_first(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", ["pytorch_model-1.bin"], "pytorch_model.bin.index.json")
    assert weights_digest(path) == expected(**{"pytorch_model-1.bin": b"pytorch_model-1.bin"})
    (path / "pytorch_model.bin").write_bytes(b"bin")
    assert weights_digest(path) == expected(**{"pytorch_model.bin": b"bin"})
    model(path)
    assert weights_digest(path) == expected(**{"model.safetensors": b"weights"})


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "../x"}}',
     '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": 1}}'],
)  # fmt: skip
def test_a_bad_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        weights_digest(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no weights"):
        weights_digest(tmp_path)


def test_a_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    path = model(tmp_path / "m")
    first = weights_digest(path)
    assert weights_digest(path) == first
    (tmp_path / "link").symlink_to(path)
    assert weights_digest(tmp_path / "link") == first
    assert reads == ["model.safetensors"]


def test_a_change_is_seen_even_with_size_and_mtime_kept(tmp_path: Path, reads: list[str]) -> None:
    path = model(tmp_path / "m")
    file = path / "model.safetensors"
    first, before = weights_digest(path), file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert weights_digest(path) != first
    file.rename(path / "old")
    file.write_bytes(b"weights")
    assert weights_digest(path) == first
    assert len(reads) == 3


def test_a_young_file_is_not_trusted_to_stay(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 3600.0)
    path = model(tmp_path / "m")
    assert weights_digest(path) == weights_digest(path)
    assert len(reads) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 9, "files": {}}', b"\xff", b"[" * 100_000,
     b'{"format": 1, "files": {"/m": 5}}', b'{"format": 1, "files": []}'],
)  # fmt: skip
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, cache: Path, reads: list[str], content: bytes
) -> None:
    path = model(tmp_path / "m")
    cache.mkdir()
    (cache / fingerprint.DIGESTS).write_bytes(content)
    assert weights_digest(path) == expected(**{"model.safetensors": b"weights"})
    weights_digest(path)
    assert len(reads) == 1
    assert [p.name for p in cache.iterdir()] == [fingerprint.DIGESTS]


def test_entries_that_are_no_digests_are_not_used(tmp_path: Path, cache: Path) -> None:
    path = model(tmp_path / "m")
    weights_digest(path)
    kept = json.loads((cache / fingerprint.DIGESTS).read_text())
    (place,) = kept["files"]
    for bad in ("x", "", None, "0" * 63, ["0" * 64]):
        kept["files"][place][-1] = bad
        (cache / fingerprint.DIGESTS).write_text(json.dumps(kept))
        assert weights_digest(path) == expected(**{"model.safetensors": b"weights"})


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert weights_digest(model(tmp_path / "m")) == expected(**{"model.safetensors": b"weights"})


def test_the_cache_stays_small(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fingerprint, "_KEPT", 3)
    for number in range(5):
        weights_digest(model(tmp_path / str(number)))
    kept = json.loads((cache / fingerprint.DIGESTS).read_text())["files"]
    assert [Path(place).parent.name for place in kept] == ["2", "3", "4"]


# Modules.


class Tied(nn.Module):
    def __init__(self, seed: int = 0, tie: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.first.weight.data = torch.randn(3, 3, generator=generator).to(dtype)
        if tie:
            self.second.weight = self.first.weight
        else:
            self.second.weight.data = self.first.weight.data.clone()
        self.register_buffer("kept", torch.arange(4))
        self.register_buffer("frequencies", torch.ones(2), persistent=False)


def documented_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def test_the_digest_of_a_module_counts_tied_tensors_once() -> None:
    module = Tied()
    tensors = {
        "first.weight": module.first.weight,
        "kept": torch.arange(4),
        "frequencies": torch.ones(2),
    }
    assert module_digest(module) == documented_digest(tensors)


def change_name(module: Any) -> None:
    module.third = module.first
    del module.first
    module.second = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.first.weight.data[0, 0].add_(1e-6),
        lambda m: m.kept.add_(1),
        lambda m: m.frequencies.mul_(2),
        lambda m: setattr(m.first.weight, "data", m.first.weight.data.view(1, 9)),
        lambda m: setattr(m.first.weight, "data", m.first.weight.data.double()),
        change_name,
    ],
)  # fmt: skip
def test_any_difference_shows(change: Any) -> None:
    module = Tied()
    before = module_digest(module)
    assert module_digest(Tied()) == before
    change(module)
    assert module_digest(module) != before


def test_two_modules_of_one_shape_differ() -> None:
    assert module_digest(Tied(seed=0)) != module_digest(Tied(seed=1))
    assert module_digest(Tied(tie=False)) != module_digest(Tied())
    assert module_digest(Tied(dtype=torch.bfloat16)) != module_digest(Tied())


def test_memory_layout_does_not_show() -> None:
    module = Tied()
    before = module_digest(module)
    weight = module.first.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert module_digest(module) == before


def test_a_module_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no values"):
        module_digest(nn.Linear(2, 2, device="meta"))


def test_digests_are_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    save_file({"a": torch.arange(6.0)}, path / "model.safetensors")
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from kvlink_rag.disk.digests import module_digest, weights_digest\n"
        "torch.manual_seed(7)\n"
        "print(weights_digest(Path(sys.argv[1])), module_digest(torch.nn.Linear(3, 4)))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    torch.manual_seed(7)
    assert found == [weights_digest(path), module_digest(nn.Linear(3, 4))]


# Tokenizers: see also test_embedder.py.


class Words:
    """The least a tokenizer without a backend is: a vocabulary and a call."""

    def __init__(self, **vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [self.vocabulary.get(word, 0) for word in text.split()]}


def test_tokenizers_differ_by_vocabulary_and_by_what_they_do() -> None:
    class Lower(Words):
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return super().__call__(text.lower())

    digests = {
        tokenizer_digest(tokenizer)
        for tokenizer in (Words(the=1), Words(the=2), Words(a=1), Words(the=1, a=2), Lower(the=1))
    }
    assert len(digests) == 5
    assert tokenizer_digest(Words(a=1, the=2)) == tokenizer_digest(Words(the=2, a=1))
