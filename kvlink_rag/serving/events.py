"""Answers as HTTP gives them: whole, or as server-sent events while they are made.

    pieces → Job in a thread → a shape → JSON or events

A client that goes away ends its job. Knows `Piece` and `Whole`; each endpoint brings its shape.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .pieces import Answers, Piece, Read, Whole
from .refusals import ErrorDetail, refusal_of
from .runner import Job
from .service import Call

Result = TypeVar("Result")
Item = TypeVar("Item")

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Shape(Protocol):
    """How an endpoint writes answers. The iterators give events, see `event`."""

    def answer(self, wholes: Sequence[Whole]) -> BaseModel:
        """The whole of it."""
        ...

    def begin(self) -> Iterator[str]:
        """Before the first text."""
        ...

    def read(self, read: Read) -> Iterator[str]:
        """What a prompt's answer is read from, before its first text."""
        ...

    def piece(self, piece: Piece) -> Iterator[str]:
        """Some text."""
        ...

    def end(self, whole: Whole) -> Iterator[str]:
        """After the last text of a prompt."""
        ...

    def close(self, wholes: Sequence[Whole]) -> Iterator[str]:
        """After the last prompt."""
        ...

    def failed(self, why: ErrorDetail) -> str:
        """In place of the rest."""
        ...


async def respond(call: Call, answers: Answers, shape: Shape, *, stream: bool) -> Any:
    """The answer, whole or as a stream. What fails before the first text is an HTTP error."""
    job = call.service.runner.start(answers)
    try:
        if not stream:
            return shape.answer(await _unless_gone(call.request, _wholes(job)))
        first = await _unless_gone(call.request, job.first())
    except GoneAway:
        call.service.tally.left.inc()
        job.leave()
        return Response(status_code=499)
    except BaseException:
        job.leave()
        raise
    events = _events(call, job, first, shape)
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)


def event(fields: dict[str, Any], kind: str = "") -> str:
    """One event, with its kind where the protocol names them.

    In ASCII: some clients take U+2028 and its like for the end of a line.
    """
    named = f"event: {kind}\n" if kind else ""
    return f"{named}data: {json.dumps(fields, allow_nan=False, separators=(',', ':'))}\n\n"


class GoneAway(Exception):
    """The client closed the connection."""


async def _wholes(job: Job[Read | Piece | Whole]) -> list[Whole]:
    return [item async for item in job if isinstance(item, Whole)]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives. Raises `GoneAway` where the client closes the connection first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GoneAway
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    call: Call, job: Job[Read | Piece | Whole], first: Read | Piece | Whole, shape: Shape
) -> AsyncIterator[str]:
    """Server-sent events, to the last; the job ends with them."""
    wholes: list[Whole] = []
    try:
        for line in shape.begin():
            yield line
        async for item in _from(first, job):
            if isinstance(item, Whole):
                wholes.append(item)
            for line in _written(shape, item):
                yield line
        for line in shape.close(wholes):
            yield line
    except Exception as error:  # the status is sent already
        yield shape.failed(refusal_of(error).detail())
    finally:
        job.leave()
        if not job.ended:
            call.service.tally.left.inc()


def _written(shape: Shape, item: Read | Piece | Whole) -> Iterator[str]:
    if isinstance(item, Read):
        return shape.read(item)
    return shape.piece(item) if isinstance(item, Piece) else shape.end(item)


async def _from(first: Item, job: Job[Item]) -> AsyncIterator[Item]:
    yield first
    async for item in job:
        yield item
