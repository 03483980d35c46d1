"""Keys: what is open, what takes which scheme, in every method and on every route; and that they are never told."""

from __future__ import annotations

import base64
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from pearl_ray.core.errors import ConfigError
from pearl_ray.serving.app import create_app
from pearl_ray.serving.auth import BROWSER, OPEN
from pearl_ray.serving.backend import Backend
from pearl_ray.serving.settings import KeyRing, ServerSettings, keys_in_file
from tests.serving_fakes import FakeEngine, asking, client_of, serving

KEY, SECOND = "sk-first-9f3a", "sk-second-77b1"
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW")
UNKNOWN = ("/nowhere", "/health/", "//health", "/HEALTH", "/health%2f..", "/v1", "/ready/x", "/docs/oauth2-redirect")


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with asking(FakeEngine(), keys=KeyRing.of([KEY, SECOND])) as client:
        yield client


def paths() -> list[str]:
    """Every route of the app's own table."""
    app = create_app(Backend(), ServerSettings())
    found = []
    pending = list(app.routes)
    while pending:
        route = pending.pop()
        if isinstance(route, Route):
            found.append(route.path.replace("{model:path}", "default"))
        else:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            assert inner, f"{route!r} is of an unknown kind"
            pending += inner
    return sorted(set(found))


def test_the_route_table_is_what_it_is_thought_to_be() -> None:
    contract = {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
    }
    assert contract | {"/metrics", "/version", "/", "/docs", "/openapi.json"} <= set(paths())


@pytest.mark.parametrize("path", [*paths(), *UNKNOWN])
def test_without_a_key_only_health_and_ready_answer(client: httpx.Client, path: str) -> None:
    for method in METHODS:
        response = client.request(method, str(client.base_url).rstrip("/") + path)
        if path in OPEN:
            assert response.status_code == (200 if method == "GET" else 405), (method, path)
        else:
            assert response.status_code == 401, (method, path, response.status_code)
            scheme = "Basic" if path in BROWSER else "Bearer"
            assert response.headers["www-authenticate"].startswith(scheme)
            if method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", sorted(set(paths()) - OPEN))
def test_each_key_opens_as_bearer_and_for_a_browser_as_basic_password(client: httpx.Client, path: str) -> None:
    for key in (KEY, SECOND):
        assert client.get(path, headers=bearer(key)).status_code in (200, 405)
        assert client.get(path, headers=basic(key)).status_code == (200 if path in BROWSER else 401)
    for wrong in (bearer(KEY + "x"), bearer(KEY[:-1]), bearer("x"), basic("x"), {"Authorization": KEY}):
        assert client.get(path, headers=wrong).status_code == 401
    for odd in ("Basic !!!", "Basic " + base64.b64encode(KEY.encode()).decode(), "Bearer", "Bearer \xff\xfe", ""):
        assert client.get(path, headers={"Authorization": odd.encode("latin-1")}).status_code == 401


def test_two_authorization_headers_are_refused(client: httpx.Client) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
    assert client.get("/v1/models", headers=headers).status_code == 401


def test_a_websocket_is_closed_without_a_key() -> None:
    import anyio

    app = create_app(Backend(), ServerSettings(keys=KeyRing.of([KEY])))
    sent: list[dict[str, object]] = []

    async def connect() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "subprotocols": []}
        await app(scope, receive, send)  # type: ignore[arg-type]

    anyio.run(connect)
    assert [m["type"] for m in sent] == ["websocket.close"]


def test_a_request_with_a_key_is_answered(client: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    assert client.post("/v1/completions", json=body, headers=bearer(SECOND)).json()["choices"][0]["text"] == "The"
    security = client.get("/openapi.json", headers=bearer(KEY)).json()["components"]["securitySchemes"]
    assert security["key"]["scheme"] == "bearer"


def test_no_key_is_in_a_log_a_pickle_or_a_representation(caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing.of([KEY])
    settings = ServerSettings(keys=ring)
    assert KEY.encode() not in pickle.dumps(settings) and "digests" not in repr(settings)
    with caplog.at_level(logging.DEBUG), serving(FakeEngine(), keys=ring) as server:
        thread = server._thread.ident
        with client_of(server) as client:
            client.get(f"/v1/models?key={KEY}", headers=bearer(KEY))
            client.get("/v1/models", headers=bearer(KEY + "wrong"))
    # A line follows its answer: all are written now that the server has ended. Another test's server, in a thread of
    # its own, may still write that of its last answer.
    ours = [record for record in caplog.records if record.name.startswith("pearl_ray")]
    lines = [vars(record)["fields"] for record in ours if record.threadName != "http" or record.thread == thread]
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/models", 200), ("/v1/models", 401)]
    libraries = [record for record in caplog.records if record.thread == thread]  # the server's; not the client's
    assert not any(KEY in str(vars(record)) + record.getMessage() for record in ours + libraries)


@pytest.mark.parametrize("bad", ["", "two words", "tab\t", "umlaut\u00e4", "line\n"])
def test_a_key_that_no_header_can_hold_is_refused_without_telling_it(bad: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.of([bad])
    assert not bad or bad not in str(caught.value)


def test_keys_are_read_from_a_file_one_per_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nsk-a\n\n  sk-b  \n")
    assert keys_in_file(path) == ["sk-a", "sk-b"]
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="at least one key"):
        keys_in_file(path)


def test_cors_is_off_unless_set() -> None:
    headers = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    with asking(FakeEngine()) as client:
        assert client.options("/v1/completions", headers=headers).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=headers).headers
    with asking(FakeEngine(), cors_origins=("http://a.example",), keys=KeyRing.of([KEY])) as client:
        assert client.options("/v1/completions", headers=headers).status_code == 200
        other = client.options("/v1/completions", headers={**headers, "Origin": "http://b.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        refused = client.get("/v1/models", headers=headers)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "http://a.example"
