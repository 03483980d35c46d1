"""Bodies that nobody would write: never a 5xx, never an undocumented status, never an error in another form."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving_fakes import FakeEngine, serving

NUM_BODIES = 600
NUM_CASES = 6  # of each operation
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "\ud800", "\x00", "ü" * 40, "null", [], [[]], [None], [0], [[1]], ["x"], ["x", 1], {}, {"a": 1}, {"65": 5},
    {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user"}],
    [{"role": "tool", "content": None}],
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def odd_body(fields: list[str], base: dict[str, Any], choose: random.Random) -> bytes:
    body: Any = dict(base)
    for _ in range(choose.choice([1, 1, 1, 2])):
        name = choose.choice(fields) if choose.random() < 0.95 else choose.choice(["\ud800", "", "model ", "__class__"])
        body[name] = choose.choice(ODD)
    if choose.random() < 0.05:
        body = choose.choice(ODD)
    text = json.dumps(body).encode()
    if choose.random() < 0.05:
        at = choose.randrange(len(text))
        text = text[:at] + choose.randbytes(3) + text[at + 1 :]
    return text


def test_odd_bodies_are_answered_or_refused_as_documented(
    client: httpx.Client, engine: FakeEngine, document: dict[str, Any]
) -> None:
    bases = {
        "/v1/completions": {"prompt": "x", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [65]},
    }
    choose = random.Random(20)
    seen: dict[int, int] = {}
    for number in range(NUM_BODIES):
        path = list(bases)[number % 4 if number % 3 else number % 2]
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        fields = sorted(document["components"]["schemas"][schema]["properties"])
        content = odd_body(fields, bases[path], choose)
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        assert response.status_code < 500 and str(response.status_code) in operation["responses"], (content, response)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, content
    assert seen[200] > NUM_BODIES / 50 and seen[400] > NUM_BODIES / 4 and not engine.running


def test_schemathesis_finds_no_answer_that_the_document_does_not_know() -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    with serving(FakeEngine()) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            @settings(max_examples=NUM_CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                case.call_and_validate(checks=checks)

            check()
