"""Every class without a model argument: the pair `small`, in a directory of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index.embeddings.contriever import ContrieverEmbedding
from llama_index.llms.kvlink import KVLink, KVLinkRegister
from llama_index.response_synthesizers.kvlink import KVLinkSynthesizer
from llama_index.retrievers.kvlink import KVLinkRetriever

from kvlink_rag import load_embedder
from kvlink_rag.errors import KVLinkError

QUESTION = "When was the harbour of Orvale built?"


def nodes() -> list[TextNode]:
    texts = {
        "Orvale": "The harbour of Orvale was built in 1911. Its lighthouse stands on a rock.",
        "Marnik": "Marnik is a town in the hills. Its market is held every Tuesday morning.",
        "Teldon": "The bridge of Teldon was opened in 1876 and crosses the river Sarn.",
    }
    return [
        TextNode(id_=title.lower(), text=text, metadata={"title": title})
        for title, text in texts.items()
    ]


def test_no_arguments_anywhere(small: str, tmp_path: Path) -> None:
    retriever = KVLinkRetriever(k=2)
    retriever.add(nodes())
    engine = RetrieverQueryEngine(retriever, KVLinkSynthesizer(KVLink(max_new_tokens=4)))
    response = engine.query(QUESTION)
    assert response.response
    assert response.source_nodes[0].node_id == "orvale"
    told = response.metadata["kvlink"]
    assert told["trace"]["snapshots_found"] == 2
    assert (tmp_path / "collection" / "catalog.sqlite").exists()
    assert retriever.rag is KVLink().rag is KVLinkRegister().rag
    assert (retriever.rag.model_name, retriever.rag.embedder_name) == (small, small)
    # and as the model counts
    llm = KVLink()
    usage = llm.complete(QUESTION, max_new_tokens=1).raw["usage"]
    outside = usage["prompt_tokens"] - len(llm.tokenizer(QUESTION))
    assert 0 < outside < 64  # the template round one message
    assert llm.rag.model.window - 512 < llm.metadata.context_window < llm.rag.model.window


@pytest.mark.parametrize(
    "first_use",
    [lambda: KVLink().complete(QUESTION), lambda: KVLinkRetriever().add(nodes())],
    ids=["model", "retriever"],
)
def test_a_newcomer_is_told_how_to_get_it(
    first_use: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLINK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KVLinkError, match="kvlink-rag models get small"):
        first_use()


def test_an_encoder_is_loaded_as_its_own_files_say(encoder: Path, tmp_path: Path) -> None:
    plain = load_embedder(encoder, device="cpu")
    directory = shutil.copytree(encoder, tmp_path / "encoder")
    names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    kinds = {path: f"sentence_transformers.models.{kind}" for path, kind in names.items()}
    steps = [{"path": path, "type": kind} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(steps))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    vector = plain.embed(["a mill"])[0]
    expected = pytest.approx((vector / np.linalg.norm(vector)).tolist(), abs=1e-5)
    assert np.linalg.norm(vector) != pytest.approx(1, abs=0.01)
    assert ContrieverEmbedding(directory).get_query_embedding("a mill") == expected


def test_the_swap_with_the_default_store(small: str) -> None:
    llm = KVLink(max_new_tokens=4)
    index = VectorStoreIndex(
        nodes(), transformations=[KVLinkRegister()], embed_model=ContrieverEmbedding()
    )
    KVLinkRegister()(nodes())
    response = index.as_query_engine(llm=llm, similarity_top_k=2).query(QUESTION)
    assert response.source_nodes[0].node_id == "orvale"
    assert response.response
    assert response.response != "Empty Response"
