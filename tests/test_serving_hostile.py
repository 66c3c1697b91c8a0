"""Hundreds of requests that no client should send: each is answered, none with a fault of ours."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")

from server import EMBEDDER, READER, Running, make_towns, running

from kvlink_rag.serving.endpoints import ENDPOINTS

CASES = 400
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        "model": READER,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}],
        "max_tokens": 1,
        "stream": False,
        "stop": ["a"],
        "seed": 1,
        "temperature": 0.5,
    },
    "/v1/responses": {
        "model": READER,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Where?"}]}],
        "tools": [{"type": "file_search", "vector_store_ids": ["towns"], "max_num_results": 1}],
        "include": ["file_search_call.results"],
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 1,
    },
    "/v1/completions": {"model": "kvlink/towns", "prompt": ["Where?"], "max_tokens": 1, "k": 1},
    "/v1/embeddings": {"model": EMBEDDER, "input": ["a"], "encoding_format": "float"},
    "/v1/vector_stores": {"name": "a", "metadata": {"a": "b"}, "file_ids": []},
    "/v1/vector_stores/towns": {"name": "a"},
    "/v1/vector_stores/towns/search": {
        "query": ["mill"],
        "max_num_results": 2,
        "filters": {"type": "and", "filters": [{"type": "eq", "key": "a", "value": 1}]},
    },
    "/v1/vector_stores/towns/files": {"file_id": "file-a", "attributes": {"a": 1}},
}
ODD = [
    *(None, True, 0, -1, 1.5, 1e308, 2**63, 2**70, "", "x", "\0", "\u202e", "../../etc/passwd"),
    *("a" * 3000, [], {}, [[]], [None], {"": None}, [["a"]], [{}], ["a", 1], "kvlink/", [1, -1]),
    *({"type": "and"}, {"type": "static"}, [{"role": "user"}], "file-\u2028", "9" * 400, [2**40]),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("hostile")
    make_towns(root)
    with running(root) as server:
        yield server


def spoilt(value: Any, chance: random.Random) -> Any:
    """`value`, with one thing in it another."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        done = {**value, key: spoilt(value[key], chance)}
        if chance.random() < 0.1:
            del done[key]
        return done
    if isinstance(value, list) and value and chance.random() < 0.7:
        return [spoilt(value[0], chance), *value[1:]]
    return chance.choice(ODD)


def bytes_of(body: Any, chance: random.Random) -> bytes:
    """As JSON; now and then cut, with a byte changed, or far too deep."""
    raw = json.dumps(body).encode()
    kind = chance.random()
    if kind < 0.1:
        return raw[: chance.randrange(len(raw))]
    if kind < 0.2:
        at = chance.randrange(len(raw))
        return raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]
    if kind < 0.25:
        return b"[" * 50_000
    return raw


def test_spoilt_bodies(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(15)
    seen: dict[int, int] = {}
    with server.client() as http:
        for _ in range(CASES):
            path, body = chance.choice(list(BODIES.items()))
            raw = bytes_of(spoilt(body, chance), chance)
            answer = http.post(path, content=raw, headers={"Content-Type": "application/json"})
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (path, raw[:300], answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "Traceback" not in answer.text
            assert str(server.root) not in answer.text
    assert "a request failed" not in caplog.text
    assert seen[400] > CASES / 2
    assert seen[200] > 5  # what was spoilt may be harmless


def test_odd_paths_and_queries(server: Running) -> None:
    chance = random.Random(16)
    signs = ["..", "%00", "%2e%2e%2f", "a" * 500, "%ff", "'", "*", "[", "%0d%0a", "\u00fc", "-1"]
    with server.client() as http:
        for _ in range(CASES // 2):
            endpoint = chance.choice(ENDPOINTS)
            path = "/".join(
                chance.choice(signs) if step.startswith("{") else step
                for step in endpoint.path.split("/")
            )
            name = chance.choice(["limit", "order", "after", "before", "filter", "purpose"])
            method = chance.choice(["GET", "DELETE", "PUT", "PATCH", "HEAD", endpoint.method])
            query = {name: chance.choice([*signs, "0", "1e9", "desc"])}
            answer = http.request(method, path, params=query)
            assert answer.status_code < 500, (method, path, query, answer.text)
            if answer.status_code >= 400 and method != "HEAD":
                assert "error" in answer.json()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\0\1\2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; "
        b"boundary=x\r\nContent-Length: 30\r\n\r\n--x\r\nContent-Disposition: a\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data\r\n"
        b"Content-Length: 3\r\n\r\nabc",
    ],
)
def test_what_is_hardly_http(server: Running, raw: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(raw)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 4")
    assert b"Traceback" not in answer
    with server.client() as http:
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "name", ["../../a.txt", "..", "a\0.txt", "a\n.txt", "x" * 300, "", "/etc/"]
)
def test_names_of_uploads_name_no_places(server: Running, name: str) -> None:
    before = {p for p in server.root.rglob("*") if "files" not in p.parts}
    with server.client() as http:
        answer = http.post("/v1/files", files={"file": (name, b"text", "text/plain")})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert "/" not in answer.json()["filename"]
    assert {p for p in server.root.rglob("*") if "files" not in p.parts} == before
