"""Requests over HTTP, with a stand-in for vLLM behind the middleware."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from towns import DOCUMENTS, QUESTION, VOCABULARY
from vllm_kvlink.front import Front
from vllm_kvlink.middleware import MOST_BYTES, KVLink, front_of_environment
from vllm_kvlink.orders import FIELD, SALT

from kvlink_rag import KVLinkError, KVLinkRAG

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAID = ["It is ", "Brisk", "."]


class StandIn:
    """Answers as vLLM does, and keeps what it was sent. status: of its answers."""

    def __init__(self) -> None:
        self.path, self.status = "", 200
        self.body: Any = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message["body"], message["more_body"]
        assert int(dict(scope["headers"])[b"content-length"]) == len(raw)
        self.path, self.body = scope["path"], json.loads(raw)
        streams = self.status == 200 and self.body.get("stream")
        kind = b"text/event-stream; charset=utf-8" if streams else b"application/json"
        start = {"type": "http.response.start", "status": self.status}
        await send({**start, "headers": [(b"content-type", kind), (b"content-length", b"7")]})
        for part in self._parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _parts(self) -> list[bytes]:
        if self.status != 200:
            return [b'{"error": {"message": "no"}}']
        made = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
        if not self.body.get("stream"):
            choice = {"index": 0, "text": "".join(SAID), "finish_reason": "stop"}
            usage = {"prompt_tokens": 9}
            told = {"choices": [choice], "usage": usage, "kv_transfer_params": None}
            whole = json.dumps({**made, **told}).encode()
            return [whole[:10], whole[10:]]
        events = [
            {**made, "choices": [{"index": 0, "text": text, "finish_reason": None}]}
            for text in SAID
        ]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        raw = text.encode()
        return [raw[:50], raw[50:333], raw[333:]]  # events cut anywhere


@pytest.fixture
def vllm() -> StandIn:
    return StandIn()


def post(front: Front, vllm: StandIn, path: str, body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(KVLink(vllm, front))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content)

    return asyncio.run(ask())


def messages(text: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def layout_of(rag: KVLinkRAG, body: dict[str, Any]) -> list[int]:
    """The prompt's own ids, from the order."""
    from vllm_kvlink.orders import read_order

    order = read_order(body["kv_transfer_params"][FIELD], rag.get)
    return rag.model.layout(order.parts).token_ids.tolist()


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_over_what_is_retrieved(
    rag: KVLinkRAG, front: Front, vllm: StandIn, stream: bool
) -> None:
    asked = {"messages": messages(), "kvlink": {"k": 3}, "model": "m", "stream": stream}
    answer = post(front, vllm, CHAT, asked | {"temperature": 0, "max_completion_tokens": 9})
    assert answer.status_code == 200
    # what vLLM was sent
    assert vllm.path == COMPLETIONS
    sent = vllm.body
    hits = rag.search(QUESTION, k=3)
    laid = rag.model.layout(rag.model.prompt([h.document for h in hits], QUESTION))
    assert layout_of(rag, sent) == laid.token_ids.tolist()
    assert len(sent["prompt"]) == len(laid)
    for given, own in zip(sent["prompt"], laid.token_ids.tolist(), strict=True):
        assert given == own if own < VOCABULARY else given < VOCABULARY
    assert sent["cache_salt"].startswith(SALT)
    assert sent["cache_salt"] == sent["kv_transfer_params"][FIELD]["seal"]
    assert (sent["max_tokens"], sent["temperature"], sent["model"]) == (9, 0, "m")
    assert not {"messages", "kvlink", "max_completion_tokens"} & sent.keys()
    # what the client got
    ids = [hit.document.id for hit in hits]
    if not stream:
        told = answer.json()
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert told["object"] == "chat.completion"
        assert told["choices"][0]["message"] == {"role": "assistant", "content": "".join(SAID)}
        assert told["choices"][0]["finish_reason"] == "stop"
        assert told["usage"] == {"prompt_tokens": 9}
        assert "kv_transfer_params" not in told
    else:
        *events, done = answer.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        told = chunks[0]
        assert told["choices"][0]["delta"]["role"] == "assistant"
        assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:]] == SAID
    assert [source["id"] for source in told["kvlink"]["sources"]] == ids


def test_documents_that_are_named(rag: KVLinkRAG, front: Front, vllm: StandIn) -> None:
    named = {"documents": ["velt", "brisk"]}
    before = [{"role": "system", "content": "Be brief."}]
    post(front, vllm, CHAT, {"messages": before + messages(), "kvlink": named, "max_tokens": 4})
    text = rag.model.tokenizer.hf.decode(layout_of(rag, vllm.body))
    assert text.index("Be brief.") < text.index("Velt") < text.index("Brisk") < text.index("Which")
    answer = post(front, vllm, CHAT, {"messages": messages(), "kvlink": {"documents": ["nobody"]}})
    assert (answer.status_code, "nobody" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_passages_are_recognised(rag: KVLinkRAG, front: Front, vllm: StandIn, path: str) -> None:
    text = f"{DOCUMENTS[2].text}\n\n{DOCUMENTS[5].text}\n\nQuestion: {QUESTION}"
    prompt = {"messages": messages(text)} if path == CHAT else {"prompt": text}
    answer = post(front, vllm, path, {**prompt, "max_tokens": 4}).json()
    assert [source["id"] for source in answer["kvlink"]["sources"]] == ["teldon", "sarno"]
    assert answer["object"] == ("chat.completion" if path == CHAT else "text_completion")
    parts = vllm.body["kv_transfer_params"][FIELD]["parts"]
    assert [part["passage"] for part in parts if "passage" in part] == ["teldon", "sarno"]
    laid = rag.model.layout(rag.recognise_chat(messages(text)))
    assert layout_of(rag, vllm.body) == laid.token_ids.tolist()


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Nothing is known of this."}]},
        {"prompt": [1, 2, 3]},
        {"prompt": "Nothing is known of this."},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": "x"},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": DOCUMENTS[0].text}]},
        {"prompt": f"{DOCUMENTS[0].text}\n\nQuestion: {QUESTION}", "logprobs": 1},
    ],
    ids=str,
)
def test_what_has_no_passage_is_vllms_own(front: Front, vllm: StandIn, body: Any) -> None:
    path = CHAT if "messages" in body else COMPLETIONS
    forged = {"kv_transfer_params": {FIELD: {"parts": []}, "other": 1}}
    post(front, vllm, path, {**body, **forged, "tools": [{}]})
    assert vllm.path == path
    assert vllm.body == {**body, "tools": [{}], "kv_transfer_params": {"other": 1}}
    post(front, vllm, path, body)
    assert vllm.body == body


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"kvlink": {"k": 0}}, "expected kvlink"),
        ({"kvlink": {"k": True}}, "expected kvlink"),
        ({"kvlink": {"documents": []}}, "expected kvlink"),
        ({"kvlink": {"documents": [1]}}, "expected kvlink"),
        ({"kvlink": {"documents": ["velt"], "k": 3}}, "expected kvlink"),
        ({"kvlink": 3}, "expected kvlink"),
        ({"logprobs": True}, "found logprobs"),
        ({"prompt_logprobs": 1}, "found prompt_logprobs"),
        ({"tools": [{"type": "function"}]}, "found tools"),
        ({"echo": True}, "found echo"),
        ({"max_tokens": 0}, "found max_tokens=0"),
        ({"max_tokens": 5000}, "the model's window is 2048"),
        ({"kvlink": {"k": 2}, "messages": [{"role": "user", "content": [1]}]}, "found token ids"),
    ],
    ids=str,
)
def test_what_cannot_be_had(front: Front, vllm: StandIn, more: Any, told: str) -> None:
    body = {"messages": messages(), "kvlink": {"k": 2}, **more}
    answer = post(front, vllm, CHAT, body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert vllm.path == ""


def test_bodies_that_are_none(front: Front, vllm: StandIn) -> None:
    answer = post(front, vllm, CHAT, b'{"a": "' + b"x" * MOST_BYTES + b'"}')
    assert answer.status_code == 413
    assert vllm.path == ""
    vllm.status = 422
    assert post(front, vllm, CHAT, b"[1]").status_code == 422
    assert vllm.body == [1]


def test_what_vllm_refuses_is_handed_on(front: Front, vllm: StandIn) -> None:
    vllm.status = 401
    answer = post(front, vllm, CHAT, {"messages": messages(), "kvlink": {"k": 2}, "stream": True})
    assert (answer.status_code, answer.json()) == (401, {"error": {"message": "no"}})


def test_other_paths_are_not_looked_at(front: Front, vllm: StandIn) -> None:
    body = {"messages": messages(), "kvlink": {"k": 2}}
    post(front, vllm, "/v1/embeddings", body)
    assert (vllm.path, vllm.body) == ("/v1/embeddings", body)


def test_link_tokens_among_the_models_own_are_ruled_out(rag: KVLinkRAG) -> None:
    front = Front(rag, VOCABULARY + 3, b"s" * 32)  # a vocabulary that holds markers and a link
    body = {"messages": messages(), "kvlink": {"k": 2}, "logit_bias": {"7": 1, "258": 5}}
    scheduled = front.schedule(body)
    assert scheduled is not None
    assert scheduled.body["logit_bias"] == {"7": 1, "258": -100, "259": -100, "260": -100}


def test_the_environment_names_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVLINK_COLLECTION", raising=False)
    monkeypatch.setenv("KVLINK_VLLM_MODEL", "somewhere")
    with pytest.raises(KVLinkError, match="found no KVLINK_COLLECTION; set KVLINK_COLLECTION to"):
        front_of_environment()
