"""Between vLLM's OpenAI server and its clients: requests that name or hold documents are laid out.

    vllm serve DIRECTORY --middleware vllm_kvlink.middleware.KVLinkMiddleware --kv-transfer-config …

Plain ASGI. Answers, streams and all other requests pass as they are. Knows HTTP; what becomes of a
body is the affair of `front`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kvlink_rag.errors import DocumentNotFound, KVLinkError, PromptError, PromptTooLong

from .front import Body, Front, check_client

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

Refusal = tuple[int, str, str | None]  # status, message, code

LONGEST = 32 << 20  # bytes of a body
NO_REQUEST = b"null"  # which vLLM refuses
LAID_OUT = {"/v1/chat/completions": Front.chat, "/v1/completions": Front.completion}


class KVLinkMiddleware:
    """Named in `--middleware`. The collection is the one of `--kv-transfer-config`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._front: Front | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or _is_form(scope):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(functools.partial(self._prepared, scope), receive, send)
        lengthless = [header for header in scope["headers"] if header[0] != b"content-length"]
        scope["headers"] = lengthless  # the body may become another
        await self._app(scope, exchange.receive, exchange.send)

    def _prepared(self, scope: Scope, data: bytes) -> bytes:
        """The body that vLLM is given: laid out, or the same bytes. Raises `KVLinkError`."""
        try:
            body = json.loads(data)
        except ValueError:
            return data  # vLLM says what is wrong with it
        if not isinstance(body, dict):
            return data
        check_client(body)
        lay_out = LAID_OUT.get(scope["path"])
        if lay_out is None:
            return data
        made: Body = lay_out(self._front_of(scope), body)
        return data if made is body else json.dumps(made).encode()

    def _front_of(self, scope: Scope) -> Front:
        """Opened by the first request, which is the first to know the server's configuration."""
        with self._lock:
            if self._front is None:
                self._front = Front.of(scope["app"].state.vllm_config)
            return self._front


def _is_form(scope: Scope) -> bool:
    """Whether the body is a form, such as an uploaded file, and no JSON."""
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return any(kind.startswith((b"multipart/", b"application/x-www-form")) for kind in kinds)


class _Exchange:
    """One request and its answer.

    vLLM puts the middleware that it is given outside of its own, which asks for the API key. So a
    body is only looked at when vLLM reads it, and who has no key learns nothing of what is here.
    Where a request is refused, vLLM is given no request, and our answer takes the place of its own.
    """

    def __init__(self, prepare: Callable[[bytes], bytes], receive: Receive, send: Send) -> None:
        self._prepare, self._receive, self._send = prepare, receive, send
        self._read = False
        self._refusal: Refusal | None = None

    async def receive(self) -> Message:
        """The body, laid out, then what comes from the client."""
        if self._read:
            return await self._receive()
        self._read = True
        data = await _whole(self._receive)
        if data is None:
            return {"type": "http.disconnect"}
        if len(data) > LONGEST:
            self._refusal = (413, f"the body has more than {LONGEST} bytes; send less", None)
        else:
            try:
                data = await asyncio.to_thread(self._prepare, data)
            except KVLinkError as error:
                self._refusal = _told(error)
        body = data if self._refusal is None else NO_REQUEST
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """vLLM's answer, or ours where there is a refusal."""
        if self._refusal is None:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await _answer(self._send, *self._refusal)


async def _whole(receive: Receive) -> bytes | None:
    """The body, no further than it may go; None where the client left."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        data += message.get("body", b"")
        if not message.get("more_body") or len(data) > LONGEST:
            return bytes(data)


def _told(error: KVLinkError) -> Refusal:
    """Status, message and code of a refusal; what is the server's own fault is a 500."""
    if isinstance(error, DocumentNotFound):
        return 404, str(error), "document_not_found"
    if isinstance(error, PromptTooLong):
        return 400, str(error), "context_length_exceeded"
    if isinstance(error, PromptError):
        return 400, str(error), None
    logger.error("a request could not be laid out: %s", error)
    return 500, "the collection cannot be read; the server's log says why", None


async def _answer(send: Send, status: int, message: str, code: str | None) -> None:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    data = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
