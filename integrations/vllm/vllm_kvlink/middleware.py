"""The front end inside vLLM's own OpenAI server: `--middleware vllm_kvlink.middleware.KVLink`.

    POST /v1/chat/completions or /v1/completions → `front` → vLLM's /v1/completions → the answer

Requests without passages, and all other paths, are vLLM's own. The collection is named by the
environment: KVLINK_COLLECTION, and KVLINK_VLLM_MODEL, the directory that vLLM serves.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from kvlink_rag import KVLinkError, KVLinkRAG

from .export import vocabulary_of
from .front import Front, Scheduled, answered, streamed
from .orders import FIELD, secret_in

COLLECTION, SERVED = "KVLINK_COLLECTION", "KVLINK_VLLM_MODEL"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_BYTES = 4 << 20  # of a body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class KVLink:
    """ASGI middleware; vLLM makes it with the app alone. front: for tests."""

    def __init__(self, app: App, front: Front | None = None) -> None:
        self._app = app
        self._front = front or front_of_environment()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or _path(scope)
            not in (
                CHAT,
                COMPLETIONS,
            )
        ):
            await self._app(scope, receive, send)
            return
        raw = await _body(receive)
        if raw is None:
            await _refuse(send, 413, f"the body has more than {MOST_BYTES} bytes")
            return
        body = _parsed(raw)
        if body is None:
            await self._app(scope, _replay(raw, receive), send)
            return
        try:
            scheduled = await asyncio.to_thread(self._front.schedule, body)
        except KVLinkError as error:
            await _refuse(send, 400, str(error.args[0] if error.args else error))
            return
        if scheduled is None:
            own = _unordered(body, raw)
            await self._app(_sized(scope, own), _replay(own, receive), send)
            return
        new = json.dumps(scheduled.body).encode()
        answer = _Answer(scheduled, send)
        await self._app(_to_completions(_sized(scope, new)), _replay(new, receive), answer.send)


def front_of_environment() -> Front:
    """The front end of the collection that the environment names. Raises `KVLinkError`."""
    named = {name: os.environ.get(name, "") for name in (COLLECTION, SERVED)}
    if missing := [name for name, value in named.items() if not value]:
        raise KVLinkError(
            f"found no {' and no '.join(missing)}; set {COLLECTION} to the collection's directory "
            f"and {SERVED} to the directory that vLLM serves"
        )
    rag = KVLinkRAG.open(named[COLLECTION], create=False)
    return Front(rag, vocabulary_of(Path(named[SERVED])), secret_in(rag.directory))


class _Answer:
    """vLLM's answer on its way to the client."""

    def __init__(self, scheduled: Scheduled, send: Send) -> None:
        self._scheduled, self._send = scheduled, send
        self._start: Message | None = None
        self._held = b""
        self._streams = self._fails = False
        self._first = True

    async def send(self, message: Message) -> None:
        """One message of ASGI."""
        if message["type"] == "http.response.start":
            self._start = message
            headers = dict(message.get("headers", ()))
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self._fails = message["status"] != 200
            if self._streams:
                await self._send(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._held += message.get("body", b"")
        more = message.get("more_body", False)
        if self._streams:
            sent = b"".join(self._events(last=not more))
            await self._send({"type": "http.response.body", "body": sent, "more_body": more})
        elif not more:
            await self._whole()

    async def _whole(self) -> None:
        assert self._start is not None
        body = self._held
        if not self._fails:
            body = json.dumps(answered(json.loads(body), self._scheduled)).encode()
        headers = [h for h in self._start.get("headers", ()) if h[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _events(self, *, last: bool) -> Iterator[bytes]:
        """The events that are whole, as the client's."""
        *whole, self._held = self._held.split(b"\n\n")
        if last and self._held.strip():
            whole, self._held = [*whole, self._held], b""
        for event in whole:
            data = event.removeprefix(b"data: ")
            if data.strip() == b"[DONE]" or not event.startswith(b"data: "):
                yield event + b"\n\n"
                continue
            for chunk in streamed(json.loads(data), self._scheduled, self._first):
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            self._first = False


def _path(scope: Scope) -> str:
    path = str(scope["path"])
    return path.removeprefix(scope.get("root_path") or "")


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it
    return body if isinstance(body, dict) else None


def _unordered(body: dict[str, Any], raw: bytes) -> bytes:
    """The body for vLLM, without an order that the client wrote."""
    given = body.get("kv_transfer_params")
    if not isinstance(given, dict) or FIELD not in given:
        return raw
    kept = {key: value for key, value in given.items() if key != FIELD}
    return json.dumps({**body, "kv_transfer_params": kept or None}).encode()


def _to_completions(scope: Scope) -> Scope:
    root = scope.get("root_path") or ""
    path = f"{root if scope['path'].startswith(root) else ''}{COMPLETIONS}"
    return {**scope, "path": path, "raw_path": path.encode()}


def _sized(scope: Scope, body: bytes) -> Scope:
    """With the length of another body."""
    headers = [h for h in scope["headers"] if h[0] not in (b"content-length", b"transfer-encoding")]
    headers.append((b"content-length", str(len(body)).encode()))
    return {**scope, "headers": headers}


async def _body(receive: Receive) -> bytes | None:
    """The whole body, or None where it is too long."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives `body`, then what else comes, such as that the client left."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, why: str) -> None:
    error = {"message": why, "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
