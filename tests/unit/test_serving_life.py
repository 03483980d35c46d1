"""Limits, hang-ups, drain and death: who is refused, who is aborted, and what the last words are."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pearl_ray.core.errors import EngineDeadError
from pearl_ray.serving.logs import JsonFormatter, TextFormatter
from pearl_ray.serving.server import HttpServer
from tests.serving_fakes import ANSWER, WAIT_S, FakeEngine, asking, client_of, serving, wait_until

LONG = {"prompt": "x", "max_tokens": 1000, "stream": True}
SHORT = {"prompt": "x", "max_tokens": 5}


def lines(response: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))


def send(server: HttpServer, body: dict[str, Any]) -> socket.socket:
    """Ask for a completion; whoever closes the socket hangs up."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(server.address, timeout=WAIT_S)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("held", [False, True], ids=["between_chunks", "in_a_silence"])
def test_a_client_that_hangs_up_mid_stream_aborts_its_request(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the hanging-up that is noticed: the answers would last longer than is waited for, and nothing is pinged."""
    monkeypatch.setattr("pearl_ray.serving.answers.PING_S", 3600)
    engine = FakeEngine(delay_s=0.4, held=held)
    with serving(engine) as server:
        body = {**LONG, "prompt": ["x", "y"]}
        with client_of(server) as client, client.stream("POST", "/v1/completions", json=body) as response:
            events = lines(response)  # the response closes with its iterator
            next(events)
            assert len(engine.running) == 2
        wait_until(lambda: not engine.running)
        assert len(engine.aborted) == 2
        wait_until(lambda: server._app.state.services.gate.count == 0)


def test_a_client_that_hangs_up_while_it_waits_for_a_whole_answer_aborts_it_too() -> None:
    engine = FakeEngine(held=True)
    with serving(engine) as server:
        with send(server, {**LONG, "stream": False}):
            wait_until(lambda: engine.running)
        wait_until(lambda: len(engine.aborted) == 1 and not engine.running)
        wait_until(lambda: server._app.state.services.gate.count == 0)


def test_a_stream_nobody_read_from_is_aborted(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(held=True)
    with caplog.at_level(logging.INFO, "pearl_ray"), serving(engine) as server:
        for _ in range(10):
            send(server, {**LONG, "prompt": "x"}).close()
        waiting = [send(server, {**LONG, "prompt": "y"}) for _ in range(10)]
        wait_until(lambda: sum(prompt[-1] == ord("y") for prompt, _ in list(engine.submitted)) == 10)
        for connection in waiting:
            connection.close()
        # Each has a line once it has ended, those that never came to be submitted too.
        wait_until(lambda: sum(record.name == "pearl_ray.access" for record in list(caplog.records)) == 20)
        wait_until(lambda: not engine.running)
        assert server._app.state.services.gate.count == 0 and len(engine.aborted) == len(engine.submitted)


def test_a_body_over_the_limit_is_refused_with_or_without_its_length_told() -> None:
    url = "/v1/completions"
    with asking(FakeEngine(), max_body_bytes=1000) as client:
        for content in (b"x" * 1001, (b"x" * 100 for _ in range(11))):
            response = client.post(url, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        fits = json.dumps({**SHORT, "prompt": "x" * 900}).encode()
        assert client.post(url, content=fits, headers={"Content-Type": "application/json"}).status_code == 200


def test_a_body_that_never_arrives_is_given_up() -> None:
    with (
        serving(FakeEngine(), body_timeout_s=0.1) as server,
        socket.create_connection(server.address, timeout=WAIT_S) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_full_queue_and_too_many_requests_are_429_with_retry_after() -> None:
    engine, url = FakeEngine(room=2, held=True), "/v1/completions"
    with asking(engine, max_concurrent_requests=2) as client:
        full = client.post(url, json={**SHORT, "prompt": ["a", "b", "c"]})
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
        with client.stream("POST", url, json=LONG) as one, client.stream("POST", url, json=LONG) as two:
            held = [lines(one), lines(two)]
            assert all(next(events) for events in held)
            third = client.post(url, json=SHORT)
            assert third.status_code == 429 and third.headers["retry-after"] == "1"
            assert third.json()["error"] == {
                "message": "2 requests are running, the most at one time",
                "type": "rate_limit_error",
                "param": None,
                "code": "too_many_requests",
            }
        wait_until(lambda: not engine.running)
        engine.held = False
        assert client.post(url, json=SHORT).status_code == 200


def test_while_loading_it_lives_but_is_not_ready() -> None:
    with serving() as server, client_of(server) as client:
        server.report("loading", 3, 30)
        assert client.get("/health").json() == {"status": "ok"}
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json() == {"status": "not ready", "reason": "loading (3 of 30)"}
        response = client.post("/v1/completions", json=SHORT)
        assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
        assert client.get("/metrics").status_code == 200


def test_ready_says_what_state_the_deployment_is_in() -> None:
    engine = FakeEngine()
    with asking(engine) as client:
        assert client.get("/ready").status_code == 200
        engine.state = {"state": "recovering", "error": "the draft died"}
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json()["reason"] == "recovering: the draft died"
        assert client.get("/health").status_code == 200


def test_when_the_engine_dies_streams_end_with_an_error_and_health_says_so() -> None:
    engine = FakeEngine(held=True)
    with serving(engine) as server, client_of(server) as client:
        with client.stream("POST", "/v1/completions", json=LONG) as response:
            events = lines(response)
            next(events)
            engine.fail(EngineDeadError("shard target 0 died"))
            *_, error, done = events
        assert json.loads(error)["error"]["message"] == "shard target 0 died" and done == "[DONE]"
        assert server.failed.wait(WAIT_S)
        assert client.get("/health").json() == {"status": "failed", "reason": "shard target 0 died"}
        assert client.get("/ready").status_code == 503
        response = client.post("/v1/completions", json=SHORT)
        assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


def drain(server: HttpServer, seconds: float) -> threading.Thread:
    thread = threading.Thread(target=server.stop, args=(seconds,))
    thread.start()
    return thread


def test_a_drain_lets_running_streams_end_and_takes_no_new_ones() -> None:
    engine = FakeEngine(held=True)
    with serving(engine) as server, client_of(server) as client:
        body = {**LONG, "max_tokens": 80}
        with client.stream("POST", "/v1/completions", json=body) as response:
            events = lines(response)
            first = next(events)
            thread = drain(server, WAIT_S)
            wait_until(lambda: server._app.state.services.gate.is_draining)
            assert client.get("/ready").json()["reason"] == "shutting down"
            refused = client.post("/v1/completions", json=SHORT)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            engine.held = False
            texts = [json.loads(e)["choices"][0]["text"] for e in (first, *events) if e != "[DONE]"]
        assert "".join(texts) == (ANSWER * 2)[:80]
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("hurried", [False, True])
def test_what_is_left_after_a_drain_ends_with_a_final_error(hurried: bool) -> None:
    engine = FakeEngine(held=True)
    with serving(engine) as server:
        with client_of(server) as client, client.stream("POST", "/v1/completions", json=LONG) as response:
            events = lines(response)
            next(events)
            thread = drain(server, 100 * WAIT_S if hurried else 0.2)
            if hurried:
                server.hurry()
            *_, error, done = events
        assert json.loads(error)["error"]["code"] == "shutting_down" and done == "[DONE]"
        thread.join(WAIT_S)
        assert not thread.is_alive() and len(engine.aborted) == 1


def test_a_request_is_one_log_line_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pearl_ray"), asking(FakeEngine()) as client:
        body = {"prompt": "a secret prompt", "max_tokens": 5, "user": "u\n1"}
        client.post("/v1/completions?q=hidden", json=body)
    # The server has ended: the line, which follows the answer, is written.
    (record,) = [record for record in caplog.records if record.name == "pearl_ray.access"]
    line = json.loads(JsonFormatter().format(record))
    assert line["path"] == "/v1/completions" and line["status"] == 200 and line["user"] == "u\n1"
    assert line["prompt_tokens"] == 16 and line["completion_tokens"] == 5 and line["duration_s"] > 0
    text = TextFormatter().format(record)
    assert "completion_tokens=5" in text and '"u\\n1"' in text and "\n" not in text
    assert not any(word in text + json.dumps(line) for word in ("secret", "hidden", ANSWER[:5]))
