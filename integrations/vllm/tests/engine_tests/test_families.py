"""Every model type that is taken unasked, on the real vLLM, and llama in bfloat16.

Run by `make test-vllm`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conftest import NoEmbedder
from engine_tests.engines import Said, ask, engine, needs_vllm, transfer
from vllm_kvlink import Handover, export
from vllm_kvlink.refusals import MODEL_TYPES

from kvlink_rag import KVLinkModel, KVLinkRAG

pytestmark = [needs_vllm, pytest.mark.filterwarnings("default")]

STEPS = 6


def served(root: Path, family: str, dtype: str) -> tuple[KVLinkModel, Handover, int, Said]:
    """What vLLM says to one prompt, and the model and prompt to compare it with."""
    source = tiny.saved(root / "model", family, getattr(torch, dtype))
    model = KVLinkModel.from_pretrained(source, device="cpu", dtype=dtype)
    vocabulary = export(model, root / "served")  # Qwen2's tokenizer knows one token more
    with KVLinkRAG.open(
        *(root / "collection",), model=source, embedder=NoEmbedder(), dtype=dtype, codec="exact"
    ) as rag:
        rag.register(tiny.documents())
    handover = Handover.of(model.layout(model.prompt(tiny.documents(), "When was it built?")))
    config = transfer(root / "collection")
    with engine(root / "served", config, dtype=dtype, num_gpu_blocks_override=32) as llm:
        (said,) = ask(llm, handover, vocabulary=vocabulary, steps=STEPS)
    return model, handover, vocabulary, said


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_are_the_masked_prefills(tmp_path: Path, family: str) -> None:
    model, handover, vocabulary, said = served(tmp_path, family, "float32")
    ids, first = tiny.greedy(model, handover.layout(model.spec.header), STEPS, vocabulary)
    assert said.token_ids == ids
    for id, found in said.first.items():
        assert found == pytest.approx(float(first[id]), abs=1e-4)


def test_all_types_that_are_taken_are_tried() -> None:
    assert {tiny.module(family=name).config.model_type for name in tiny.FAMILIES} == MODEL_TYPES


def test_bfloat16(tmp_path: Path) -> None:
    """Rounding differs from engine to engine: as close as two forwards of kvlink_rag's own are."""
    model, handover, vocabulary, said = served(tmp_path, "llama", "bfloat16")
    layout = handover.layout(model.spec.header)
    masked = model.states(layout, "masked").logits[:vocabulary]
    scale = float(masked.abs().max())
    first = masked.log_softmax(-1)
    for id, found in said.first.items():
        assert found == pytest.approx(float(first[id]), abs=6e-2 * scale)
    assert first[said.token_ids[0]] >= first.max() - 6e-2 * scale
