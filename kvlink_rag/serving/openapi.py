"""The OpenAPI document of a table of endpoints. Knows shapes; knows no service."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from kvlink_rag._version import __version__

from .refusals import ErrorAnswer
from .service import Endpoint

_REF = "#/components/schemas/{model}"
_TAKEN: JsonSchemaMode = "validation"
_GIVEN: JsonSchemaMode = "serialization"
_UPLOAD = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string"},
    },
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document, as JSON has it."""
    taken = [(e.body, _TAKEN) for e in endpoints if e.body]
    taken += [(e.query, _TAKEN) for e in endpoints if e.query]
    given = [(e.answer, _GIVEN) for e in endpoints if e.answer] + [(ErrorAnswer, _GIVEN)]
    unique = list(dict.fromkeys([*taken, *given]))
    refs, definitions = models_json_schema(unique, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path}", "}")
        operation = _operation(endpoint, refs, definitions["$defs"])
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvlink-rag",
            "version": __version__,
            "description": "OpenAI's API over collections of documents. Fields that neither API "
            "knows are passed over; OpenAI's that are not served are answered with 400.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, refs: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)(?::path)?\}", endpoint.path)
    text = {"type": "string"}
    parameters = [{"name": n, "in": "path", "required": True, "schema": text} for n in names]
    if endpoint.query:
        name = refs[endpoint.query, _TAKEN]["$ref"].rpartition("/")[2]
        for field, schema in definitions[name]["properties"].items():
            parameters.append({"name": field, "in": "query", "schema": schema})
    operation: dict[str, Any] = {
        "operationId": endpoint.serve.__name__,
        "summary": endpoint.summary,
        "parameters": parameters,
        "responses": {"200": _answer(endpoint, refs), "default": _error(refs)},
    }
    if endpoint.body:
        schema = refs[endpoint.body, _TAKEN]
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    if endpoint.form:
        content = {"multipart/form-data": {"schema": _UPLOAD}}
        operation["requestBody"] = {"required": True, "content": content}
    if not endpoint.open:
        operation["security"] = [{"key": []}, {}]
    return operation


def _answer(endpoint: Endpoint, refs: Any) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media: {}}
    if endpoint.answer:
        content = {endpoint.media: {"schema": refs[endpoint.answer, _GIVEN]}}
    if endpoint.sse:
        content["text/event-stream"] = {}
    return {"description": "done", "content": content}


def _error(refs: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": refs[ErrorAnswer, _GIVEN]}}
    return {"description": "refused, or failed", "content": content}
