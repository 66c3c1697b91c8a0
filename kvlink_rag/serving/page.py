"""The page at `/`: a few files of the package, sent as they are.

They need no key, for they say nothing of anybody; what they ask for does. Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/page/view.js": ("view.js", "text/javascript; charset=utf-8"),
}
PATHS = tuple(_FILES)
# Nothing from elsewhere runs or loads, whatever a document says; `data:` is the empty icon.
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def routes() -> list[Route]:
    """A route for each file."""
    return [Route(path, _sent(*found)) for path, found in _FILES.items()]


def _sent(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files(__package__) / "page" / name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, headers={**_HEADERS, "Content-Type": kind})

    return send
