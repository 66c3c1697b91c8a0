"""Opening a collection: arguments are checked first, and nobody waits for what he does not need."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelMaker, WordEmbedder

from kvlink_rag import Document, KVLinkModel, KVLinkRAG
from kvlink_rag.errors import ConfigError


def descriptors() -> set[str]:
    """What this process has open, by name."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc here")
    return {os.readlink(link) for link in folder.iterdir() if link.is_symlink()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": "bogus"},
        {"search": "bogus"},
        {"order": "bogus"},
        {"compression": "bogus"},
        {"size_limit": "many"},
        {"prefix_budget": -1},
        {"device_budget": "few"},
        {"pinned_budget": "none"},
        {"embedder": object()},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_argument_leaves_nothing_behind(tmp_path: Path, wrong: dict[str, Any]) -> None:
    before = descriptors()
    with pytest.raises(ConfigError):
        KVLinkRAG.open(tmp_path / "new", **wrong)
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_a_refused_model_leaves_nothing_open(
    tmp_path: Path, make_model: ModelMaker, embedder: WordEmbedder
) -> None:
    with KVLinkRAG.open(tmp_path / "c", model=make_model("llama"), embedder=embedder) as rag:
        rag.add([Document("a mill by a river")])
    with pytest.raises(ConfigError, match="this collection was made with the model"):
        KVLinkRAG.open(tmp_path / "c", model=make_model("qwen2"))
    assert not [name for name in descriptors() if name.startswith(str(tmp_path))]


def test_a_search_does_not_wait_for_the_language_model(
    tmp_path: Path,
    make_model: ModelMaker,
    embedder: WordEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama")
    with KVLinkRAG.open(tmp_path / "c", model=model, embedder=embedder) as rag:
        rag.add([Document("a mill by a river", id="mill")])
    loading, searched = threading.Event(), threading.Event()

    def load(*arguments: Any, **options: Any) -> KVLinkModel:
        loading.set()
        assert searched.wait(3600), "the search waited for the model"
        return model

    monkeypatch.setattr(KVLinkModel, "from_pretrained", load)
    with KVLinkRAG.open(tmp_path / "c", embedder=embedder) as rag:
        loader = threading.Thread(target=lambda: rag.model)
        loader.start()
        loading.wait()
        assert [hit.document.id for hit in rag.search("mill", 1)] == ["mill"]
        searched.set()
        loader.join()
        assert rag.model is model
