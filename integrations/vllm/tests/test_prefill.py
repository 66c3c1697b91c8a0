"""What the worker hands over, against transformers' own decoding and the collection's answers."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from towns import DOCUMENTS, QUESTION, VOCABULARY, open_towns
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_kvlink.export import ABOUT, export, exported_fingerprint, vocabulary_of
from vllm_kvlink.front import Front
from vllm_kvlink.loading import Loads
from vllm_kvlink.orders import FIELD, OrderError, secret_in
from vllm_kvlink.pages import slots
from vllm_kvlink.prefill import Prefiller

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import ConfigError, DocumentNotFound

BLOCK = 16


def ordered(front: Front, k: int = 4) -> dict[str, Any]:
    scheduled = front.schedule({"prompt": QUESTION, "kvlink": {"k": k}, "max_tokens": 8})
    assert scheduled is not None
    return scheduled.body


def order_of(body: dict[str, Any]) -> object:
    return body["kv_transfer_params"][FIELD]


def prefiller(rag: KVLinkRAG) -> Prefiller:
    return Prefiller(rag, secret_in(rag.directory))


def test_another_engine_decodes_to_the_same_answer(
    rag: KVLinkRAG, front: Front, tmp_path: Path
) -> None:
    """Pages in any order; transformers computes the last token, then decodes, on the export."""
    served = AutoModelForCausalLM.from_pretrained(export(rag.model, tmp_path / "served"))
    assert served.config.vocab_size == VOCABULARY
    body = ordered(front)
    ids = body["prompt"]
    assert max(ids) < VOCABULARY
    stop = len(ids) - 1
    entries = Prefiller(rag, secret_in(rag.directory)).entries(
        body["kv_transfer_params"][FIELD], 0, stop
    )  # type: ignore[index]
    blocks = torch.randperm(40)[: -(-len(ids) // BLOCK)].tolist()
    at = slots(blocks, BLOCK, 0, stop)
    assert len(set(at.tolist())) == stop
    pages = torch.zeros(2, *entries.keys.shape[:2], 40 * BLOCK, entries.keys.shape[-1])
    pages[0][:, :, at], pages[1][:, :, at] = entries.keys, entries.values
    cache = DynamicCache()
    for layer in range(rag.model.backbone.layers):
        cache.update(pages[0][None, layer][:, :, at], pages[1][None, layer][:, :, at], layer)
    said: list[int] = []
    token = torch.tensor([[ids[-1]]])
    with torch.inference_mode():
        for place in range(stop, stop + 8):
            logits = served(
                token, past_key_values=cache, position_ids=torch.tensor([[place]])
            ).logits[0, -1]
            if not said:
                expected = rag.model.prefill(
                    rag.model.prompt([h.document for h in rag.search(QUESTION, k=4)], QUESTION),
                    mode="masked",
                ).logits[:VOCABULARY]
                assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
                logits[257] = -torch.inf  # an answer is not empty
            token = logits.argmax()[None, None]
            said.append(int(token))
    answer = rag.ask(QUESTION, k=4, max_new_tokens=8).text
    assert rag.model.tokenizer.hf.decode(said, skip_special_tokens=True) == answer


def test_a_part_is_the_same_part_of_the_whole(rag: KVLinkRAG, front: Front) -> None:
    order = order_of(ordered(front))
    worker = prefiller(rag)
    whole = worker.entries(order, 0, 60)
    part = worker.entries(order, 32, 60)
    assert torch.equal(part.keys, whole.keys[:, :, 32:])
    assert torch.equal(part.values, whole.values[:, :, 32:])
    with pytest.raises(OrderError, match="found tokens 0 to 5000"):
        worker.entries(order, 0, 5000)


def test_a_document_that_changes_meanwhile_is_told(rag: KVLinkRAG, front: Front) -> None:
    order = order_of(ordered(front, k=8))
    worker = prefiller(rag)
    worker.entries(order, 0, 10)
    with pytest.raises(OrderError, match="seal is another one"):
        Prefiller(rag, b"another secret" * 3).entries(order, 0, 10)
    changed = DOCUMENTS[3].__class__("Another text.", "Brisk", "brisk")
    rag.update([changed])
    with pytest.raises(OrderError, match="a document has changed since"):
        worker.entries(order, 0, 10)
    rag.delete(["brisk"])
    with pytest.raises(DocumentNotFound):
        worker.entries(order, 0, 10)


def test_what_is_lost_is_encoded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with open_towns(tmp_path / "lost", pair) as rag:
        front = Front(rag, VOCABULARY, secret_in(rag.directory))
        order = order_of(ordered(front))
        worker = prefiller(rag)
        whole = worker.entries(order, 0, 60)
        rag.reuse.prefix.clear()  # type: ignore[union-attr]
        for key in list(rag.store.keys()):
            rag.store.delete(key)
        again = worker.entries(order, 0, 60)
        assert (again.keys - whole.keys).abs().max() < 1e-5


def test_an_export_is_known_again(rag: KVLinkRAG, tmp_path: Path) -> None:
    path = export(rag.model, tmp_path / "served")
    assert exported_fingerprint(path) == rag.model.fingerprint
    assert vocabulary_of(path) == VOCABULARY
    with pytest.raises(ConfigError, match="expected an empty or new directory"):
        export(rag.model, path)
    (path / ABOUT).write_text("[]")
    assert exported_fingerprint(path) == ""
    with pytest.raises(ConfigError, match="python -m vllm_kvlink export"):
        vocabulary_of(path)


def test_slots() -> None:
    assert slots([7, 2], 4, 1, 7).tolist() == [29, 30, 31, 8, 9, 10]
    assert slots([], 4, 0, 0).tolist() == []
    for start, stop in ((0, 9), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="do not lie in 2 pages of 4"):
            slots([7, 2], 4, start, stop)


def test_every_load_is_reported_once() -> None:
    loads, gate = Loads(), threading.Event()
    for name in ("a", "b", "c"):
        loads.begin(name, partial(broken if name == "b" else len, ()))
    loads.begin("gate", gate.set)  # a pool of threads begins in order
    assert gate.wait(60)
    ended: set[str] = set()
    failed: set[str] = set()
    while len(ended) < 4:
        new = loads.ended()
        assert not new.all & ended
        ended, failed = ended | new.all, failed | new.failed
    loads.close()
    assert (ended, failed) == ({"a", "b", "c", "gate"}, {"b"})


def broken(given: object) -> None:
    raise RuntimeError("of this request alone")
