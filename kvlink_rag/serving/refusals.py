"""What a client is told when a request cannot be served, in OpenAI's error form.

Knows errors and HTTP statuses; knows no endpoint. What is not the client's to know (paths, damaged
files, faults of ours) is logged here and not sent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from kvlink_rag.errors import (
    DeviceMemoryError,
    DocumentNotFound,
    KVLinkError,
    MissingExtra,
    PromptTooLong,
    StorageError,
)

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 1000  # of a message; what a client sent is quoted in some


class ErrorDetail(BaseModel):
    """What was wrong; param: with which field, code: a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


@dataclass
class Refused(Exception):
    """A request that is not served. retry_after: seconds, where trying again may help."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def detail(self) -> ErrorDetail:
        """As it is sent."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = self.message[:MOST_CHARACTERS]
        return ErrorDetail(
            message=message,
            type=kinds.get(self.status, kind),
            param=self.param,
            code=self.code,
        )

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        body = ErrorAnswer(error=self.detail()).model_dump()
        return JSONResponse(body, self.status, headers=headers)


def not_found(what: str, name: str, code: str | None = None) -> Refused:
    """What is not there, or not for this key, which are told alike."""
    return Refused(404, f"found no {what} {name[:200]!r}", code=code or f"{what}_not_found")


def refusal_of(error: BaseException) -> Refused:
    """What a client is told of `error`."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, DocumentNotFound):
        return Refused(404, str(error.args[0]), code="not_found")
    if isinstance(error, PromptTooLong):
        return Refused(400, str(error), code="context_length_exceeded")
    if isinstance(error, DeviceMemoryError):
        return Refused(503, "the device has no memory for this prompt now", retry_after=5)
    if isinstance(error, MissingExtra):
        logger.error("%s", error)
        return Refused(501, "the server lacks a package that this needs; its log says which")
    if isinstance(error, KVLinkError) and not isinstance(error, StorageError):
        return Refused(400, str(error))
    logger.error("a request failed", exc_info=error)
    return Refused(500, "the server failed; its log says how", code="internal_error")


def _of_validation(error: ValidationError) -> Refused:
    """One thing that is wrong with a body or a query.

    Where a field may be of several kinds, each has its complaint: the one that looked deepest is
    told, and not that a list is no text.
    """
    found = error.errors(include_url=False, include_context=False)
    first = max(found, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    place = ".".join(str(step) for step in first["loc"] if _is_named(step))
    message = first["msg"].removeprefix("Value error, ")
    param = str(first["loc"][0]) if first["loc"] else None
    return Refused(400, f"{place}: {message}" if place else message, param, first["type"])


def _is_named(step: str | int) -> bool:
    """Whether a step of a place is a field or a number, and no kind of a library's."""
    return isinstance(step, int) or step.isidentifier()
