"""Collections that are open once in a process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkModel
from kvlink_rag.collection.opened import default_directory, shared_collection
from kvlink_rag.errors import ConfigError, SettingsMismatch


@pytest.fixture
def model(make_model: ModelMaker) -> KVLinkModel:
    return make_model("llama", torch.float32)


def test_one_collection_a_directory(tmp_path: Path, model: KVLinkModel) -> None:
    rag = shared_collection(tmp_path / "a", model=model)
    assert shared_collection(tmp_path / "a") is rag
    assert shared_collection(str(tmp_path / "b" / ".." / "a"), model=model) is rag
    assert shared_collection(tmp_path / "b", model=model) is not rag


def test_other_models_are_not_mixed_up(
    tmp_path: Path, make_model: ModelMaker, model: KVLinkModel, embedder: WordEmbedder
) -> None:
    rag = shared_collection(tmp_path, model=model, embedder=embedder)
    rag.add([Document("The harbour of Orvale.")])
    with pytest.raises(SettingsMismatch):
        shared_collection(tmp_path, model=make_model("llama", torch.float32, seed=1))
    with pytest.raises(SettingsMismatch):
        shared_collection(tmp_path, embedder=WordEmbedder("salt"))
    assert shared_collection(tmp_path, embedder=embedder) is rag


def test_names_and_devices_are_compared(tmp_path: Path) -> None:
    rag = shared_collection(tmp_path, device="cpu")
    assert shared_collection(tmp_path, model="small", embedder="small") is rag
    assert shared_collection(tmp_path, device="cpu") is rag
    assert shared_collection(tmp_path, device="cuda") is not rag
    assert shared_collection(tmp_path, model="owner/other") is not rag


def test_threads_get_the_same(tmp_path: Path, model: KVLinkModel) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: shared_collection(tmp_path, model=model), range(16)))
    assert len(set(map(id, found))) == 1


def test_it_goes_with_its_last_holder(tmp_path: Path, model: KVLinkModel) -> None:
    gone = weakref.ref(shared_collection(tmp_path, model=model))
    gc.collect()
    assert gone() is None
    assert shared_collection(tmp_path, model=model).directory == tmp_path.resolve()


def test_its_tier_is_closed_with_it(
    tmp_path: Path, model: KVLinkModel, embedder: WordEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was offered to the tier is written before the last holder has let go."""
    tier = tmp_path / "tier"
    tier.mkdir()
    url = f"file://{tier}?unsigned=1"
    rag = shared_collection(tmp_path / "c", model=model, embedder=embedder, remote=url)
    assert shared_collection(tmp_path / "c") is rag
    assert shared_collection(tmp_path / "c", remote=url) is rag
    other = shared_collection(tmp_path / "c", remote="")
    assert other is not rag
    assert other.parts.remote is None
    monkeypatch.setenv("KVLINK_REMOTE", url)
    assert shared_collection(tmp_path / "c") in (rag, other)
    told = rag.parts.remote
    assert told is not None
    rag.add([Document("The harbour of Orvale.")])
    del rag
    gc.collect()
    assert [path for path in tier.rglob("*") if path.is_file()]
    assert told._closed


def test_the_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    assert default_directory() == tmp_path / "collection"
    assert shared_collection().directory == (tmp_path / "collection").resolve()


def test_it_is_closed_when_the_process_ends(tmp_path: Path) -> None:
    code = f"from kvlink_rag.collection.opened import *; r = shared_collection({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_one_whose_directory_is_gone_is_closed_without_a_word(
    tmp_path: Path, saved_pair: tuple[Path, Path]
) -> None:
    lm, encoder = map(str, saved_pair)
    code = (
        "import logging, shutil; logging.basicConfig()\n"
        "from kvlink_rag import Document\n"
        "from kvlink_rag.collection.opened import shared_collection\n"
        f"rag = shared_collection({str(tmp_path / 'c')!r}, model={lm!r}, embedder={encoder!r})\n"
        "rag.add([Document('The harbour of Orvale.')])\n"
        f"shutil.rmtree({str(tmp_path / 'c')!r})"
    )
    quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=quiet
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_outline_says_what_the_model_says(tmp_path: Path, model: KVLinkModel) -> None:
    outline = shared_collection(tmp_path, model=model).outline()
    assert (outline.name, outline.window) == (model.name, model.window)
    assert outline.spec is model.spec
    assert outline.tokenizer.encode("Orvale") == model.tokenizer.encode("Orvale")
    assert not outline.has_chat_template
    assert outline.link_tokens == 40 * 5 + 2


def test_outline_of_files_loads_no_weights(tmp_path: Path, model: KVLinkModel) -> None:
    where = tmp_path / "model"
    model.backbone.config.save_pretrained(where)
    model.tokenizer.hf.save_pretrained(where)
    (where / "kvlink.json").write_text(model.spec.to_json())
    outline = shared_collection(tmp_path / "c", model=where).outline()
    assert (outline.window, outline.spec) == (model.window, model.spec)
    assert outline.tokenizer.encode("<eos> é") == model.tokenizer.encode("<eos> é")
    with pytest.raises(ConfigError):
        shared_collection(tmp_path / "d", model=tmp_path / "c").outline()


def test_codecs_are_compared(tmp_path: Path, model: KVLinkModel) -> None:
    rag = shared_collection(tmp_path / "a", model=model, codec="int8")
    rag.register([Document("The harbour of Orvale.")])
    assert rag.codec == "int8"
    assert shared_collection(tmp_path / "a") is rag
    assert shared_collection(tmp_path / "a", codec="int8") is rag
    with pytest.raises(SettingsMismatch, match="codec 'exact'"):
        shared_collection(tmp_path / "a", codec="exact")
