"""vLLM engines over a collection, in this process, one at a time.

Everything of vLLM is imported inside functions: these tests are collected without it, too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm_kvlink import Handover
from vllm_kvlink.handover import KEY

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
)
SMALL_PAGES = {"block_size": 32, "max_num_seqs": 8, "max_model_len": 512, "enforce_eager": True}


def transfer(collection: Path, **more: Any) -> dict[str, Any]:
    """What `--kv-transfer-config` says."""
    return {
        "kv_connector": "KVLinkConnector",
        "kv_connector_module_path": "vllm_kvlink.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"collection": str(collection), "device": "cpu"},
        **more,
    }


def environment() -> dict[str, str]:
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def engine(served: Path, config: Mapping[str, Any], **arguments: Any) -> Iterator[Any]:
    """An `LLM`, shut down behind the block."""
    os.environ.update(environment())
    from vllm import LLM

    llm = LLM(
        str(served),
        **{"dtype": "float32", **SMALL_PAGES, **arguments},
        kv_transfer_config=dict(config),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

        ensure_kv_transfer_shutdown()


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """token_ids: the answer. first: log-probabilities of the first token, by id. why: its end."""

    token_ids: list[int]
    first: dict[int, float]
    why: str


def ask(llm: Any, *handovers: Handover, vocabulary: int, steps: int = 8) -> list[Said]:
    """Greedy answers to prompts that are handed over, all at once."""
    prompts = [request(h.placeholders(vocabulary), h.salt) for h in handovers]
    carried = [{"kv_transfer_params": {KEY: h.to_json()}} for h in handovers]
    return _generate(llm, prompts, carried, steps)


def ask_plain(llm: Any, ids: list[int], *, salt: str | None = None, steps: int = 8) -> Said:
    """vLLM's own greedy answer to these ids."""
    return _generate(llm, [request(ids, salt)], [None], steps)[0]


def request(ids: list[int], salt: str | None) -> dict[str, Any]:
    return {"prompt_token_ids": ids, **({} if salt is None else {"cache_salt": salt})}


def _generate(llm: Any, prompts: list[Any], carried: list[Any], steps: int) -> list[Said]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0, max_tokens=steps, logprobs=5, ignore_eos=True, extra_args=extra
        )
        for extra in carried
    ]
    outputs = [one.outputs[0] for one in llm.generate(prompts, sampling, use_tqdm=False)]
    return [
        Said(
            list(one.token_ids),
            {id: found.logprob for id, found in (one.logprobs or [{}])[0].items()},
            str(one.finish_reason),
        )
        for one in outputs
    ]
