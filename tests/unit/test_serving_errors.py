"""What is refused, with which status, and in OpenAI's form every time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pearl_ray.serving.unsupported import NOT_HONOURED
from tests.serving_fakes import FakeEngine, asking

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT = {"messages": MESSAGES, "max_tokens": 2}
TEXT = {"prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with asking(FakeEngine()) as http:
        yield http


BAD: list[tuple[str, Any, str | None, str]] = [
    ("chat/completions", {**CHAT, "tempature": 1}, "tempature", "unrecognized request field: tempature"),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "x", "mood": 1}]},
        "messages.0.mood",
        "mood",
    ),
    ("chat/completions", {"max_tokens": 2}, "messages", "Field required"),
    ("chat/completions", {**CHAT, "messages": []}, "messages", "at least 1"),
    ("chat/completions", {**CHAT, "messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", "'assistant'"),
    ("chat/completions", {**CHAT, "temperature": -1}, "temperature", "greater than or equal to 0"),
    ("chat/completions", {**CHAT, "temperature": "1"}, "temperature", "valid number"),
    ("chat/completions", {**CHAT, "n": 65}, "n", "less than or equal to 64"),
    ("chat/completions", {**CHAT, "max_completion_tokens": 3}, "max_tokens", "send one"),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ("chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ("chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs", "'tokenize'"),
    ("completions", {"max_tokens": 2}, "prompt", "Field required"),
    ("completions", {**TEXT, "prompt": []}, "prompt", "empty"),
    ("completions", {**TEXT, "prompt": [[]]}, "prompt", "empty"),
    ("completions", {**TEXT, "prompt": [1, "a"]}, "prompt", "valid string"),
    ("completions", {**TEXT, "prompt": [0x3000]}, "prompt", "outside the vocabulary of 12288"),
    ("completions", {**TEXT, "prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
    ("completions", {**TEXT, "prompt": "x" * 2000}, "prompt", "2001 tokens"),
    ("completions", {**TEXT, "prompt": ["x"] * 257}, "prompt", "more than 256 answers"),
    ("completions", {**TEXT, "logit_bias": {"70000": 1}}, "logit_bias", "token 70000 is outside"),
    ("completions", {**TEXT, "logit_bias": {"x": 1}}, "logit_bias", "token id"),
    ("completions", {**TEXT, "logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
    ("completions", {**TEXT, "stop_token_ids": [70000]}, "stop_token_ids", "token 70000"),
    ("completions", {**TEXT, "stop": ["a"] * 17}, "stop", "at most 16"),
    ("completions", {**TEXT, "stop": ""}, "stop", "at least 1"),
    ("completions", {**TEXT, "min_tokens": 3}, "min_tokens", "min_tokens=3"),
    ("completions", {**TEXT, "num_speculative_tokens": 65}, "num_speculative_tokens", "less than or equal to 64"),
    ("completions", {**TEXT, "num_speculative_tokens": "auto"}, "num_speculative_tokens", "valid integer"),
    ("completions", {**TEXT, "logprobs": 21}, "logprobs", "less than or equal to 20"),
    ("completions", {**TEXT, "\ud800": 1}, None, "unicode"),
    ("completions", {**TEXT, "prompt": "a \ud800"}, None, "surrogate"),
    ("completions", {**TEXT, "prompt": ["a", "\udfff" * 3000]}, None, "surrogate"),
    ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
    ("completions", [], None, "valid dictionary"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), BAD)
def test_a_bad_field_is_refused_with_its_name(
    http: httpx.Client, path: str, body: Any, param: str | None, message: str
) -> None:
    response = http.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert message in error["message"] and error["param"] == param, error


ASKING: dict[str, dict[str, Any]] = {
    "chat": {
        "store": True,
        "service_tier": "flex",
        "modalities": ["audio"],
    },
    "completion": {"suffix": "x", "best_of": 3},
}


def test_the_table_of_what_is_not_honoured_is_what_is_refused(http: httpx.Client) -> None:
    assert all(set(NOT_HONOURED[kind]) <= set(ASKING[kind]) for kind in NOT_HONOURED)
    for kind, table in NOT_HONOURED.items():
        path = "completions" if kind == "completion" else "chat/completions"
        for name, neutral in table.items():
            cases = [(value, 200) for value in (None, *neutral)]
            if ASKING[kind][name] is not None:
                cases.append((ASKING[kind][name], 400))
            for value, status in cases:
                body = {**(TEXT if kind == "completion" else CHAT), name: value}
                response = http.post(f"/v1/{path}", json=body)
                assert response.status_code == status, (name, value, response.text)
                if status == 400:
                    error = response.json()["error"]
                    assert error["param"].endswith(name) and error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff\xfe{}", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400),
        ("POST", "/v1/completions", b"", 400),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/health/", b"", 404),
        ("POST", "/detokenize", b'{"tokens": [70000]}', 400),
        ("POST", "/tokenize", b"{}", 400),
        ("POST", "/tokenize", b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', 400),
    ],
)
def test_every_error_has_openais_form(http: httpx.Client, method: str, path: str, content: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.request(method, path, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_document_of_the_api_says_400_and_not_422_and_names_no_undocumented_field(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
    assert document["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is False
