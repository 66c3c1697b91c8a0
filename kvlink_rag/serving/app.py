"""The ASGI application: routes of the table of endpoints, behind the guard.

Knows how a request becomes a `Call` and what is given back a response; knows no endpoint's work.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import page
from .endpoints import ENDPOINTS
from .guard import LOCAL, Guard
from .openapi import document
from .refusals import Refused, refusal_of
from .service import Call, Endpoint, Service

SCHEMA = "/openapi.json"
OPEN = (SCHEMA, *page.PATHS, *(each.path for each in ENDPOINTS if each.open))  # need no key
_STATUS = {404: "found no such path", 405: "this path does not take this method"}


def make_app(service: Service, *, hosts: Collection[str] | None = LOCAL) -> Starlette:
    """The application over `service`. hosts: see `Guard`. Its lifespan starts and closes both."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.tally.of_collections(service.library.opened)
        await run_in_threadpool(service.shelf.start)
        yield
        service.runner.stopping = True
        await run_in_threadpool(service.close)

    schema = document(ENDPOINTS)
    routes = [Route(e.path, _served(service, e), methods=[e.method]) for e in ENDPOINTS]

    async def openapi(request: Request) -> Response:
        return JSONResponse(schema)

    routes += [Route(SCHEMA, openapi), *page.routes()]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, service.keys, service.limits, hosts=hosts, open=OPEN)],
        exception_handlers={HTTPException: _http_error, Exception: _error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _served(service: Service, endpoint: Endpoint) -> Callable[[Request], Any]:
    """The endpoint as Starlette calls it; whatever happens in it is an answer."""

    async def serve(request: Request) -> Response:
        try:
            response = await _answered(service, endpoint, request)
        except ClientDisconnect:
            response = Response(status_code=499)
        except HTTPException as error:  # of a form
            response = _http_error(request, error)
        except Exception as error:
            response = _error(request, error)
        service.tally.requests.labels(endpoint.path, str(response.status_code)).inc()
        return response

    return serve


async def _answered(service: Service, endpoint: Endpoint, request: Request) -> Response:
    query = endpoint.query and endpoint.query.model_validate(dict(request.query_params))
    named = (service, request.state.asker, request, request.path_params)
    if endpoint.form:
        async with request.form(max_files=1, max_fields=8) as form:
            return await _called(endpoint, Call(*named, form, query))
    body = endpoint.body and endpoint.body.model_validate_json(await request.body())
    return await _called(endpoint, Call(*named, body, query))


async def _called(endpoint: Endpoint, call: Call) -> Response:
    if inspect.iscoroutinefunction(endpoint.serve):
        given = await endpoint.serve(call)
    else:
        given = await run_in_threadpool(endpoint.serve, call)
    if isinstance(given, BaseModel):
        return Response(given.model_dump_json(), media_type="application/json")
    response: Response = given
    return response


def _error(request: Request, error: Exception) -> Response:
    return refusal_of(error).response()


def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return _error(request, error)
    message = _STATUS.get(error.status_code, str(error.detail))
    response = Refused(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response
