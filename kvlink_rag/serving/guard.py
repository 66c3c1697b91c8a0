"""What stands before every endpoint: hosts, origins, keys, sizes, and a line in the log.

A page of another site can make a browser send requests to a server on this machine, under its own
name where that name is made to mean 127.0.0.1 (DNS rebinding). So the `Host` must be a known one,
an `Origin` must be this server's own, bodies must be JSON or a form of our own page, and nothing
allows other origins. Knows ASGI; knows no endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import NOBODY, Asker, Keys
from .refusals import Refused
from .runner import Limits

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
FORMS = frozenset({"/v1/files"})  # paths that take multipart/form-data
READING = 30.0  # seconds that one read of a body may take
OVERHEAD = 64 << 10  # bytes of a form around its file

_NO_SNIFFING = (b"x-content-type-options", b"nosniff")

access = logging.getLogger("kvlink_rag.access")


class Guard:
    """Refuses what may not come in; the rest goes to `app`, with `state["asker"]`.

    hosts: names that `Host` may have; None: any, where a key is what protects. open: paths that
    need no key, each whole or, where it ends in `/*`, what is below it.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        limits: Limits,
        *,
        hosts: Collection[str] | None = LOCAL,
        open: Collection[str] = (),
    ) -> None:
        self._app, self._keys, self._limits = app, keys, limits
        self._hosts, self._open = hosts, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        start, told = time.perf_counter(), _Told(send)
        who = "-"
        try:
            headers = Headers(scope=scope)
            self._check_origin(scope, headers)
            asker = self._asker(scope["path"], headers)
            who = asker.name
            scope.setdefault("state", {})["asker"] = asker
            most = self._check_body(scope, headers)
            await self._app(scope, _Bounded(receive, most), told)
        except Refused as refusal:
            if told.status:
                raise
            await refusal.response()(scope, receive, told)
        finally:
            path = scope["path"].encode("unicode_escape").decode("ascii")[:200]
            milliseconds = (time.perf_counter() - start) * 1e3
            line = (who, scope["method"], path, told.status, told.bytes, milliseconds)
            access.info("%s %s %s %d %d bytes %.0f ms", *line)

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        if len(headers.getlist("host")) != 1:
            raise Refused(400, "expected one Host header")
        host = headers["host"]
        name = _name(host)
        if self._hosts is not None and name not in self._hosts:
            raise Refused(
                403,
                f"this server is not known as {host[:100]!r}; start it with --host-name to add it",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "requests of other origins are refused", code="origin_not_allowed")
        if headers.get("sec-fetch-site") not in (None, "same-origin", "none"):
            raise Refused(403, "requests of other sites are refused", code="origin_not_allowed")

    def _asker(self, path: str, headers: Headers) -> Asker:
        given = headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        asker = self._keys.asker(key.strip() if scheme.lower() == "bearer" else "")
        if asker is not None:
            return asker
        if path in self._open or any(
            each.endswith("/*") and path.startswith(each[:-1]) for each in self._open
        ):
            return NOBODY
        told = "this key is not known" if given else "a key is needed: Authorization: Bearer …"
        raise Refused(401, told, code="invalid_api_key")

    def _check_body(self, scope: Scope, headers: Headers) -> int:
        """The most bytes of this request's body. Raises `Refused`."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return self._limits.body
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        form = scope["path"] in FORMS
        expected = "multipart/form-data" if form else "application/json"
        if kind != expected:
            raise Refused(415, f"the body is {kind[:60] or 'nothing'}, expected {expected}")
        most = self._limits.upload + OVERHEAD if form else self._limits.body
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > most:
            raise _too_large(most)
        return most


class _Bounded:
    """A `receive` that gives at most so many bytes of a body, each step in time."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left, self._most = receive, most, most
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to leave
        try:
            message = await asyncio.wait_for(self._receive(), READING)
        except asyncio.TimeoutError:
            raise Refused(408, f"no more of the body came within {READING:g} s") from None
        self._left -= len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._left < 0:
            raise _too_large(self._most)
        return message


class _Told:
    """A `send` that notes what was sent."""

    def __init__(self, send: Send) -> None:
        self._send, self.status, self.bytes = send, 0, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), _NO_SNIFFING]
        self.bytes += len(message.get("body", b""))
        await self._send(message)


def _name(host: str) -> str:
    """The name in a `Host` header, without its port; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body is larger than {most:,} bytes", code="too_large")
