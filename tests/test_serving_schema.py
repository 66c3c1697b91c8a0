"""The OpenAPI document is true: schemathesis makes requests of it, and checks what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("starlette")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402
from server import EMBEDDER, READER, Running, make_towns, running  # noqa: E402

from kvlink_rag.serving.endpoints import ENDPOINTS  # noqa: E402

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
EXAMPLES = 12
OPERATIONS = [f"{e.method} {e.path.replace(':path}', '}')}" for e in ENDPOINTS]
# What no generator guesses: names that are there, and a conversation that ends with a question.
PLACES = {"store": "towns", "model": "kvlink/towns"}
MODELS = {
    "/v1/embeddings": EMBEDDER,
    "/v1/chat/completions": "kvlink/towns",
    "/v1/responses": "kvlink/towns",
}
QUESTION = {"role": "user", "content": "Where is the mill?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("schema")
    make_towns(root)
    with running(root, tokens=3) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_endpoint_is_in_it(document: Any) -> None:
    assert sorted(each.ok().label for each in document.get_all_operations()) == sorted(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_it_says(document: Any, label: str) -> None:
    method, path = label.split()
    seen: Counter[int] = Counter()

    @given(case=document[path][method].as_strategy())
    @settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.path_parameters.update({k: v for k, v in PLACES.items() if k in case.path_parameters})
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODELS.get(path, READER)
        if isinstance(case.body, dict) and isinstance(case.body.get("messages"), list):
            case.body["messages"].append(QUESTION)
        answer = case.call()
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    ask()
    assert max(seen) < 500
    if "{file}" not in path and path != "/v1/vector_stores/{store}" and "files" not in path:
        assert seen[200], seen
