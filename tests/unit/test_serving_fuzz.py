"""Bodies that nobody would write: never a 5xx, an undocumented status, or an error in another form; no leak."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from tests.odd_bodies import Memory, throw
from tests.serving_fakes import WAIT_S, FakeEngine, client_of, serving, wait_until

NUM_CASES = 6  # of each operation


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_odd_bodies_are_answered_or_refused_as_documented_and_leave_nothing(count: int) -> None:
    engine = FakeEngine()
    memory = Memory(count, lambda: psutil.Process().memory_info().rss)
    with serving(engine) as server, client_of(server) as client:
        throw(client, count, watch=memory.watch)
        engine.submitted.clear()
        services = server._app.state.services  # a stream's end is known here a moment after the client has it
        wait_until(lambda: not engine.running and services.gate.count == 0 and not services.backend._streams)
    assert count < 10_000 or memory.growth < 0.1, memory.samples


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
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", timeout=WAIT_S)
        for result in schema.get_all_operations():
            operation = result.ok()

            @settings(max_examples=NUM_CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                case.call_and_validate(checks=checks, timeout=WAIT_S)

            check()
