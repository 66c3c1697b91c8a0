"""Requests of OpenAI's API to laid-out ones, through the middleware as vLLM's server calls it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import vllm_kvlink.middleware
from vllm_kvlink import Handover
from vllm_kvlink.front import Front
from vllm_kvlink.handover import KEY
from vllm_kvlink.middleware import KVLinkMiddleware

from kvlink_rag import KVLinkRAG
from kvlink_rag.errors import StorageError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
QUESTION = {"role": "user", "content": "When was it built?"}
NAMED = {"kv_transfer_params": {"documents": ["Teldon", "Orvale"]}}


@pytest.fixture
def front(rag: KVLinkRAG) -> Front:
    return Front(rag, vocabulary=tiny.VOCABULARY, window=tiny.WINDOW, min_tokens=16)


class Server:
    """vLLM's side: what it was given, behind the middleware.

    locked: it wants a key and is given none, so it answers without a look at the body.
    """

    def __init__(self, front: Front | None, locked: bool = False) -> None:
        self.locked = locked
        self.got: list[tuple[dict[bytes, bytes], bytes]] = []
        self.middleware = KVLinkMiddleware(self._app)
        self.middleware._front = front

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        status = 401
        if not self.locked:
            data = await receive()
            assert not data["more_body"]
            self.got.append((dict(scope["headers"]), data["body"]))
            status = 422 if data["body"] == b"null" else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def post(self, path: str, data: bytes, kind: bytes = b"application/json") -> tuple[int, Any]:
        pieces = [data[:10], data[10:]]
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        asyncio.run(self.middleware({**scope, "app": SimpleNamespace()}, receive, send))
        return sent[0]["status"], json.loads(sent[1]["body"])

    def body(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What vLLM is given of a request that is taken."""
        status, answer = self.post(path, json.dumps(body).encode())
        assert status == 200, answer
        headers, data = self.got[-1]
        assert b"content-length" not in headers
        return json.loads(data)  # type: ignore[no-any-return]

    def refusal(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answer = self.post(path, json.dumps(body).encode())
        assert [data for _, data in self.got] == [b"null"]
        self.got.clear()
        return status, answer["error"]


@pytest.fixture
def server(front: Front) -> Server:
    return Server(front)


def handed_over(body: dict[str, Any], ids: list[int]) -> Handover:
    """The layout in a request, which agrees with the ids and the salt beside it."""
    handover = Handover.from_json(body["kv_transfer_params"][KEY])
    handover.check(ids, body["cache_salt"], tiny.VOCABULARY)
    return handover


def test_named_documents_are_the_prompt_of_ask(rag: KVLinkRAG, server: Server) -> None:
    found = rag.get(["Teldon", "Orvale"])
    expected = Handover.of(rag.model.layout(rag.model.prompt(found, QUESTION["content"])))
    body = server.body(CHAT, {"messages": [QUESTION], "model": "m", "stream": True, **NAMED})
    assert handed_over(body, body["kv_transfer_params"]["prompt_token_ids"]) == expected
    assert body["messages"] == [QUESTION]
    assert body["stream"] is True
    assert "documents" not in body["kv_transfer_params"]

    completed = server.body(COMPLETION, {"prompt": QUESTION["content"], **NAMED})
    assert handed_over(completed, completed["prompt"]) == expected


def test_named_in_vllm_xargs(server: Server) -> None:
    xargs = {"vllm_xargs": {"kvlink_documents": ["Teldon", "Orvale"], "other": 1}}
    body = server.body(CHAT, {"messages": [QUESTION], **xargs})
    same = server.body(CHAT, {"messages": [QUESTION], **NAMED})
    assert body["cache_salt"] == same["cache_salt"]
    assert body["vllm_xargs"] == {"other": 1}


def test_named_documents_in_a_conversation(rag: KVLinkRAG, server: Server) -> None:
    earlier = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    messages = [*earlier, {"role": "assistant", "content": "Hi"}, QUESTION]
    body = server.body(CHAT, {"messages": messages, **NAMED})
    handover = handed_over(body, body["kv_transfer_params"]["prompt_token_ids"])
    assert len(handover.passages) == 2
    said = [id for id in handover.token_ids if id < 256]
    assert "Be brief." in rag.model.tokenizer.decode(said)


def test_passages_are_recognised(rag: KVLinkRAG, server: Server) -> None:
    first, second = rag.get(["Brisk", "Marnik"])
    content = f"Use this.\n\n{first.text}\n\n{second.text}\n\nQuestion: When was it built?"
    messages = [{"role": "user", "content": [{"type": "text", "text": content}]}]
    body = server.body(CHAT, {"messages": messages})
    handover = handed_over(body, body["kv_transfer_params"]["prompt_token_ids"])
    expected = rag.model.layout(rag.recognise_chat([{"role": "user", "content": content}]))
    assert handover == Handover.of(expected)
    assert len(handover.passages) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [QUESTION], "cache_salt": "mine"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": "none"},
        {"messages": [QUESTION], "kv_transfer_params": "none"},
        {},
    ],
)
def test_all_else_passes_byte_for_byte(server: Server, body: dict[str, Any]) -> None:
    data = json.dumps(body, indent=3).encode()
    assert server.post(CHAT, data)[0] == 200
    assert server.got[-1][1] == data


def test_what_is_no_json_object_passes(server: Server) -> None:
    for data in (b"no json here", b"[1, 2, 3, 4, 5]"):
        assert server.post(CHAT, data)[0] == 200
        assert server.got[-1][1] == data


def test_a_body_that_is_too_long_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_kvlink.middleware, "LONGEST", 100)
    assert server.post(CHAT, b" " * 101)[0] == 413
    assert server.got[-1][1] == b"null"


def test_without_a_key_nothing_is_looked_at() -> None:
    """vLLM asks for its key inside of us: no document is named to whoever has none."""
    server = Server(None, locked=True)  # to open a collection would fail
    for named in ("Teldon", "Nowhere"):
        body = {"messages": [QUESTION], "kv_transfer_params": {"documents": [named]}}
        assert server.post(CHAT, json.dumps(body).encode())[0] == 401


def test_what_the_collection_has_wrong_is_not_told(
    server: Server, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, body: Any) -> Any:
        raise StorageError("the file /secret/place is damaged")

    monkeypatch.setitem(vllm_kvlink.middleware.LAID_OUT, CHAT, broken)
    status, error = server.refusal(CHAT, {"messages": [QUESTION], **NAMED})
    assert status == 500
    assert "secret" not in error["message"]


def test_a_tenant_has_a_salt_of_its_own(server: Server) -> None:
    asked = {"messages": [QUESTION], **NAMED}
    salts = {
        server.body(CHAT, {**asked, "cache_salt": tenant})["cache_salt"] for tenant in ("a", "b")
    }
    assert len(salts | {server.body(CHAT, asked)["cache_salt"]}) == 3


def test_no_client_writes_what_the_server_writes(server: Server) -> None:
    made = server.body(CHAT, {"messages": [QUESTION], **NAMED})
    server.got.clear()
    for path in (CHAT, COMPLETION, "/v1/responses"):
        for forged in ("cache_salt", "kv_transfer_params"):
            status, error = server.refusal(path, {"input": "x", forged: made[forged]})
            assert status == 400
            assert "found" in error["message"]


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"kv_transfer_params": {"documents": ["Nowhere"]}}, 404, "no document with id 'Nowhere'"),
        ({"kv_transfer_params": {"documents": "Teldon"}}, 400, "expected a list of their ids"),
        ({**NAMED, "prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ({**NAMED, "tools": [{"type": "function"}]}, 400, "tools"),
        ({**NAMED, "add_generation_prompt": False}, 400, "expected true"),
        ({**NAMED, "messages": [{"role": "user", "content": " "}]}, 400, "no question"),
        ({**NAMED, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        ({"kv_transfer_params": {"documents": ["Orvale"] * 9}}, 400, "9 passages"),
        ({**NAMED, "messages": [{"role": "user", "content": "long " * 400}]}, 400, "window"),
    ],
)
def test_refusals(server: Server, change: dict[str, Any], status: int, told: str) -> None:
    found, error = server.refusal(CHAT, {"messages": [QUESTION], **change})
    assert found == status
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"


def test_link_tokens_inside_the_vocabulary_are_never_said(rag: KVLinkRAG) -> None:
    whole = rag.model.backbone.vocabulary
    front = Front(rag, vocabulary=whole, window=tiny.WINDOW, min_tokens=16)
    body = front.chat({"messages": [QUESTION], **NAMED})
    never = {int(id) for id, bias in body["logit_bias"].items() if bias == -100}
    assert never == set(rag.model.spec.special_ids())
