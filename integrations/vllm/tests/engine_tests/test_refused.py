"""Engines that do not start: another model, and configurations that would answer wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import NoEmbedder
from engine_tests.engines import engine, needs_vllm, transfer
from vllm_kvlink import export

from kvlink_rag import KVLinkModel, KVLinkRAG

pytestmark = [needs_vllm, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refused")
    model = KVLinkModel.from_pretrained(tiny.saved(root / "model"), device="cpu", dtype="float32")
    export(model, root / "served")
    export(tiny.model(seed=1), root / "another")
    with KVLinkRAG.open(
        root / "collection", model=root / "model", embedder=NoEmbedder(), dtype="float32"
    ) as rag:
        rag.register(tiny.documents()[:1])
    return root


@pytest.mark.parametrize(
    ("served", "config", "arguments", "told"),
    [
        ("another", {}, {}, "has other numbers than in the model that prefills"),
        ("served", {"kv_load_failure_policy": "recompute"}, {}, "recompute passages causally"),
        ("served", {"kv_role": "kv_both"}, {}, "expected 'kv_consumer'"),
        ("served", {}, {"kv_cache_dtype": "fp8"}, "found kv_cache_dtype='fp8'"),
        (
            *("served", {}),
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                }
            },
            "found speculative decoding",
        ),
        (
            "served",
            {},
            {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
            "has rope_parameters",
        ),
    ],
)
def test_an_engine_that_would_answer_wrongly_does_not_start(
    place: Path, served: str, config: dict[str, Any], arguments: dict[str, Any], told: str
) -> None:
    given = transfer(place / "collection", **config)
    with (
        pytest.raises(Exception, match=told),
        engine(place / served, given, num_gpu_blocks_override=40, **arguments),
    ):
        pass
