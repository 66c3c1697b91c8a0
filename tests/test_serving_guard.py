"""Who may ask what of a server, how much at once, and what it tells when it refuses."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
httpx = pytest.importorskip("httpx")

import trust  # noqa: E402
from conftest import WordEmbedder  # noqa: E402
from server import READER, TOWNS, Running, make_towns, running  # noqa: E402

from kvlink_rag.errors import ConfigError  # noqa: E402
from kvlink_rag.serving import run  # noqa: E402
from kvlink_rag.serving.keys import Keys  # noqa: E402
from kvlink_rag.serving.library import claim  # noqa: E402
from kvlink_rag.serving.runner import Job, Limits  # noqa: E402
from kvlink_rag.trace import Trace  # noqa: E402

NAMES = ("all", "reads", "also", "writes", "other")
ALL, READS, ALSO, WRITES, OTHER = (f"sk-{name:->16}" for name in NAMES)
KEYS = f"{ALL}; {READS} = towns; {ALSO}=towns; {WRITES}=towns:write {OTHER}=elsewhere:write"
CHAT = "/v1/chat/completions"


def asking(model: str = "kvlink/towns", content: str = "Orvale?", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Without keys, with small limits."""
    root = tmp_path_factory.mktemp("plain")
    make_towns(root)
    with running(root, body=4000, upload=5000, at_once=1, waiting=1) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("keyed")
    make_towns(root)
    with running(root, keys=KEYS, hosts={"rag.example"}) as server:
        yield server


def ask(server: Running, key: str | None, path: str = CHAT, **body: Any) -> Any:
    with server.client(key) as http:
        http.headers["Host"] = "rag.example"
        return http.post(path, json=body) if body else http.get(path)


# Browsers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8321"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_sites_do_not_get_in(plain: Running, headers: dict[str, str], status: int) -> None:
    with plain.client() as http:
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == status
        assert not [name for name in answer.headers if name.startswith("access-control")]
        preflight = http.options(CHAT, headers={**headers, "Origin": "http://evil.example"})
        assert preflight.status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_are_json(plain: Running, kind: str) -> None:
    with plain.client() as http:
        answer = http.post(CHAT, content=json.dumps(asking()), headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_too_much_is_refused(plain: Running) -> None:
    def chunks() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(50):
            yield b" " * 100

    with plain.client() as http:
        large = http.post(CHAT, json=asking(content="a" * 5000))
        kind = {"Content-Type": "application/json"}
        unknown = http.post(CHAT, content=chunks(), headers=kind)
        file = http.post("/v1/files", files={"file": ("a.txt", b"a" * 6000)})
        files = http.post("/v1/files", files=[("file", ("a", b"a")), ("file", ("b", b"b"))])
        assert http.get("/v1/files").json()["data"] == []
    assert [r.status_code for r in (large, unknown, file, files)] == [413, 413, 413, 400]


def test_the_log_has_no_prompts(plain: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = "where-is-the-treasure"
    with caplog.at_level(logging.DEBUG), plain.client() as http:
        http.post(CHAT, json=asking(content=secret, max_tokens=1))
        http.post(CHAT, json={**asking(content=secret), "n": secret})
        http.get(f"/v1/models/a%0Ab?{secret}")
        http.get("/health")  # by its turn the others are logged
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("kvlink_rag")]
    lines = [r.getMessage() for r in caplog.records if r.name == "kvlink_rag.access"]
    lines = [line for line in lines if f" {CHAT} " in line or " /v1/models/" in line]
    assert secret not in "".join(ours)
    assert lines[0].startswith(f"- POST {CHAT} 200 ")
    assert lines[1].startswith(f"- POST {CHAT} 400 ")
    assert lines[2].startswith("- GET /v1/models/a\\nb 404 ")


def test_faults_are_logged_and_not_told(
    plain: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("the secret path /root")

    monkeypatch.setattr("kvlink_rag.serving.pieces.from_collection", fail)
    with plain.client() as http:
        for stream in (False, True):
            answer = http.post(CHAT, json=asking(stream=stream))
            assert answer.status_code == 500
            assert "secret" not in answer.text
    assert "the secret path" in caplog.text


# Keys


def test_without_a_key_nothing_but_health(keyed: Running) -> None:
    for key in (None, "sk-wrong-and-long-enough", ALL[:-1]):
        refused = ask(keyed, key, **asking())
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
        assert ask(keyed, key, "/metrics").status_code == 401
        for path in ("/health", "/ready", "/openapi.json"):
            assert ask(keyed, key, path).status_code == 200, path


def test_a_key_opens_its_collections_only(keyed: Running) -> None:
    for key, models in ((ALL, True), (READS, True), (WRITES, True), (OTHER, False)):
        named = [m["id"] for m in ask(keyed, key, "/v1/models").json()["data"]]
        assert ("kvlink/towns" in named) == models, key
        status = 200 if models else 404
        assert ask(keyed, key, **asking(max_tokens=1)).status_code == status
        assert ask(keyed, key, "/v1/vector_stores/towns").status_code == status
        found = ask(keyed, key, "/v1/vector_stores/towns/search", query="mill")
        assert found.status_code == status
        assert ask(keyed, key, "/metrics").status_code == (200 if key == ALL else 403)


def test_a_key_that_reads_does_not_write(keyed: Running) -> None:
    put = {"file_id": "file-none"}
    files = "/v1/vector_stores/towns/files"
    assert ask(keyed, READS, files, **put).status_code == 403
    assert ask(keyed, READS, "/v1/vector_stores", name="mine").status_code == 403
    assert ask(keyed, WRITES, files, **put).json()["error"]["code"] == "file_not_found"


def test_what_a_key_makes_is_its_own(keyed: Running) -> None:
    store = ask(keyed, WRITES, "/v1/vector_stores", name="mine").json()["id"]
    path = f"/v1/vector_stores/{store}"
    statuses = [ask(keyed, key, path).status_code for key in (WRITES, ALL, READS, OTHER)]
    assert statuses == [200, 200, 404, 404]
    headers = {"Host": "rag.example", "Authorization": f"Bearer {WRITES}"}
    with keyed.client() as http:
        upload = http.post("/v1/files", files={"file": ("a.txt", b"a")}, headers=headers)
        file = f"/v1/files/{upload.json()['id']}"
        statuses = [ask(keyed, key, file).status_code for key in (WRITES, ALL, READS, OTHER)]
        assert statuses == [200, 200, 404, 404]
        headers["Authorization"] = f"Bearer {OTHER}"
        assert http.delete(file, headers=headers).status_code == 404
        assert http.delete(path, headers=headers).status_code == 404


def test_the_reader_does_not_tell_what_others_hold(keyed: Running) -> None:
    """A passage of a collection is plain text to a key that may not read it."""
    _, title, text = max(TOWNS, key=lambda row: len(row[2]))
    prompt = f"{title}\n{text}\n\nQuestion: where is it?"
    cached = {}
    for key in (ALL, READS, OTHER):
        answer = ask(keyed, key, **asking(READER, prompt, max_tokens=1)).json()
        cached[key] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached[ALL] >= len(text)
    assert cached[READS] >= len(text)
    assert cached[OTHER] == 0


@pytest.mark.parametrize("model", ["kvlink/towns", READER])
def test_the_cache_does_not_tell_what_others_asked(keyed: Running, model: str) -> None:
    body = asking(model, f"a question that {model} was never asked before", max_tokens=1)
    cached = []
    for key in (READS, ALSO):
        ask(keyed, key, **asking(model, "something else", max_tokens=1))
    for key in (READS, ALSO, READS):
        usage = ask(keyed, key, **body).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[1] < cached[2]


@pytest.mark.parametrize(
    ("text", "word"),
    [("short=a", "at least 16"), (f"{ALL}=", "empty"), (f"{ALL}=a,:write", "empty")],
)
def test_keys_that_are_wrong(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        Keys.parse(text)
    assert ALL not in str(caught.value)
    assert not Keys.parse(" \n;")


# Limits


class Endless:
    """An answer of 1,000 pieces, each when it is let."""

    def __init__(self) -> None:
        self.closed, self.began, self._wanted = (
            threading.Event(),
            threading.Event(),
            threading.Semaphore(0),
        )
        self.trace, self.text, self.pieces = Trace(), "", 0

    def __iter__(self) -> Iterator[str]:
        self.began.set()
        while self.pieces < 1000:
            assert self._wanted.acquire(timeout=60)
            self.pieces += 1
            yield "a"

    def let(self, pieces: int = 1000) -> None:
        self._wanted.release(pieces)

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endless]:
    answer = Endless()
    monkeypatch.setattr("kvlink_rag.serving.pieces.from_collection", lambda *given, **named: answer)
    yield answer
    answer.let()


@contextlib.contextmanager
def sent(server: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request on a connection of its own, for a client that leaves."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        yield connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(
    plain: Running, endless: Endless, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, leave = threading.Event(), Job.leave
    monkeypatch.setattr(Job, "leave", lambda job: (leave(job), left.set()))
    with sent(plain, asking(stream=stream, max_tokens=4000)) as connection:
        assert endless.began.wait(60)
        if stream:
            endless.let(1)
            assert b"200 OK" in connection.recv(1000)
        assert not left.is_set()
    assert left.wait(60)
    assert not endless.closed.is_set()
    endless.let()  # its next piece is its last
    assert endless.closed.wait(60)
    assert 1 <= endless.pieces <= 1 + stream  # of a stream, whether the first was handed on yet


def test_beyond_the_queue_is_a_429(plain: Running, endless: Endless) -> None:
    with sent(plain, asking()), sent(plain, asking()), plain.client() as http:
        assert endless.began.wait(60)
        refused = http.post(CHAT, json=asking())
        while refused.status_code != 429:  # the second of the two may come after this one
            refused = http.post(CHAT, json=asking())
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert http.get("/health").status_code == 200
        endless.let()


def test_limits_of_time(tmp_path: Path, endless: Endless) -> None:
    make_towns(tmp_path)
    endless.let()
    with running(tmp_path, seconds=0.0) as server, server.client() as http:
        assert http.post(CHAT, json=asking()).json()["error"]["code"] == "timeout"
        events = http.post(CHAT, json=asking(stream=True)).text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    with running(tmp_path, patience=-1.0) as server, server.client() as http:
        refused = http.post(CHAT, json=asking())
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


def test_a_server_that_stops_finishes_what_runs(tmp_path: Path, endless: Endless) -> None:
    make_towns(tmp_path)
    found = []
    with running(tmp_path) as server:
        body = asking(stream=True)
        reader = threading.Thread(
            target=lambda: found.append(httpx.post(server.url + CHAT, json=body, timeout=60).text)
        )
        reader.start()
        assert endless.began.wait(60)
        server.service.runner.stopping = True
        with server.client() as http:
            assert http.get("/ready").status_code == 503
            assert http.post(CHAT, json=asking()).status_code == 503
        endless.let()
    reader.join()
    assert found[0].endswith("data: [DONE]\n\n")
    assert found[0].count('"a"') == 1000


def test_metrics(plain: Running) -> None:
    with plain.client() as http:
        http.post(CHAT, json=asking(max_tokens=3))
        text = http.get("/metrics").text
    assert f'kvlink_server_requests_total{{endpoint="{CHAT}",status="200"}}' in text
    assert 'kvlink_server_tokens_total{kind="generated"}' in text
    assert 'kvlink_documents{collection="towns"} 10.0' in text
    assert text.count("# TYPE kvlink_documents ") == 1


# What is wrong with the settings is told before a model is loaded


def served(root: Path, **changed: Any) -> None:
    def load(model: str | None, embedder: str | None) -> Any:
        raise AssertionError("loaded")

    given: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "keys": Keys(),
        "limits": Limits(),
        "k": 3,
        "say": print,
    }
    collections = changed.pop("collections", [root / "towns"])
    run.serve(collections, root / "data", load, **{**given, **changed})


def test_settings_are_checked_first(tmp_path: Path) -> None:
    make_towns(tmp_path)
    with pytest.raises(AssertionError, match="loaded"):
        served(tmp_path)
    for host in ("0.0.0.0", "192.168.1.4", "::"):
        with pytest.raises(ConfigError, match="needs a key"):
            served(tmp_path, host=host)
    with pytest.raises(ConfigError, match="such as 127"):
        served(tmp_path, host="rag.example")
    with pytest.raises(ConfigError, match="no collection in"):
        served(tmp_path, collections=[tmp_path / "none"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "towns").mkdir()
    with pytest.raises(ConfigError, match="both called"):
        served(tmp_path, collections=[tmp_path / "towns", tmp_path / "b" / "towns"])
    with trust.open_tiny(tmp_path / "odd", seed=1) as rag:
        rag.add(trust.as_documents(TOWNS[:1]))
    with pytest.raises(ConfigError, match="one model and one embedder"):
        served(tmp_path, collections=[tmp_path / "towns", tmp_path / "odd"])
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="cannot listen"),
    ):
        served(tmp_path, port=taken.getsockname()[1])
    lock = claim(tmp_path / "data")
    with pytest.raises(ConfigError, match="another server"):
        served(tmp_path)
    lock.release()


def test_another_model_than_the_collections_is_refused(tmp_path: Path) -> None:
    make_towns(tmp_path)
    with pytest.raises(ConfigError, match="model"):
        run.serve(
            [tmp_path / "towns"],
            tmp_path / "data",
            lambda model, embedder: (trust.tiny_model(1), WordEmbedder()),
            host="127.0.0.1",
            port=0,
            keys=Keys(),
            limits=Limits(),
            k=3,
            say=print,
        )
