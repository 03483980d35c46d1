"""Request bodies that nobody would write, thrown at a server: all are answered or refused as its document says."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import httpx

BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "\ud800", "\x00", "ü" * 40, "null", [], [[]], [None], [0], [[1]], ["x"], ["x", 1], {}, {"a": 1}, {"65": 5},
    {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user"}],
    [{"role": "tool", "content": None}], {"regex": "a+"}, {"json": {"type": "?"}}, {"choice": ["a", "b"]},
    [{"type": "function", "function": {"name": "f"}}], {"type": "function", "function": {"name": "f"}},
]  # fmt: skip

MILD: list[Any] = [None, True, False, 0, 1, 2, 0.5, "x", ["x"]]  # more often right


def odd_body(fields: list[str], base: Mapping[str, Any], choose: random.Random) -> bytes:
    """The body with a field or two replaced, now and then something else altogether, or bytes that are no JSON."""
    body: Any = dict(base)
    for _ in range(choose.choice([1, 1, 1, 2])):
        name = choose.choice(fields) if choose.random() < 0.95 else choose.choice(["\ud800", "", "model ", "__class__"])
        body[name] = choose.choice(ODD if choose.random() < 0.6 else MILD)
    if choose.random() < 0.05:
        body = choose.choice(ODD)
    text = json.dumps(body).encode()
    if choose.random() < 0.05:
        at = choose.randrange(len(text))
        text = text[:at] + choose.randbytes(3) + text[at + 1 :]
    return text


def throw(
    client: httpx.Client, count: int, *, seed: int = 20, watch: Callable[[int], None] = lambda _number: None
) -> Counter[int]:
    """Send that many; returns how many had which status. ``watch`` is called behind each one, with its number."""
    document = client.get("/openapi.json").json()
    choose = random.Random(seed)
    seen: Counter[int] = Counter()
    for number in range(count):
        path = list(BASES)[number % 4 if number % 3 else number % 2]
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        fields = sorted(document["components"]["schemas"][schema]["properties"])
        content = odd_body(fields, BASES[path], choose)
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        seen[response.status_code] += 1
        assert response.status_code < 500 and str(response.status_code) in operation["responses"], (content, response)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, content
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text, content
        watch(number)
    assert seen[200] > count / 50 and seen[400] > count / 4, seen
    return seen


class Memory:
    """Resident memory along a run, in bytes; level means: no more than a tenth above what it was a third in."""

    def __init__(self, count: int, measure: Callable[[], int]) -> None:
        self._count, self._measure = count, measure
        self.samples: list[int] = []

    def watch(self, number: int) -> None:
        """For :func:`throw`."""
        if number % max(self._count // 60, 1) == 0:
            self.samples.append(self._measure())

    @property
    def growth(self) -> float:
        """The end by the second sixth of the run, less 1; medians."""
        part = max(len(self.samples) // 6, 1)
        median = [sorted(some)[len(some) // 2] for some in (self.samples[part : 2 * part], self.samples[-part:])]
        return median[1] / median[0] - 1
