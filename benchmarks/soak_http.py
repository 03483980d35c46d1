"""A deployment behind its HTTP server, as the soak's load sees it. Needs the server's packages, and httpx."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec
import ray
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak_cases import Case
from benchmarks.soak_load import REQUEST_TIMEOUT_S, Piece
from pearl_ray.model.tokenizer import Tokenizer
from pearl_ray.serving.http_actor import start_http_actor
from pearl_ray.serving.http_handle import find_http_actor
from pearl_ray.serving.settings import ServerSettings

MODEL = "soaked"
GAUGES = {
    "pearl:num_requests_running": "running",
    "pearl:num_requests_waiting": "waiting",
    "pearl:kv_cache_usage_perc": "cache",
}


def start_server(name: str, tokenizer: Tokenizer) -> tuple[str, int]:
    """Start the HTTP server of a detached deployment; its URL and process."""
    url = start_http_actor(name, ServerSettings(served_model_names=(MODEL,)), "127.0.0.1", 0, tokenizer)
    server: Any = find_http_actor(name)
    return url, ray.get(server.__ray_call__.remote(lambda _: os.getpid()))


class HttpService:
    """Streams of ``POST /v1/completions``, and gauges of ``/metrics``. Use as a context manager."""

    errors: tuple[type[Exception], ...] = (httpx.HTTPError,)

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=30.0)
        self._client = httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, trust_env=False)

    async def __aenter__(self) -> HttpService:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def stream(self, case: Case) -> AsyncGenerator[Piece]:
        """See ``Service``; the tokens come with the last piece, as the stream's usage."""
        body = {"model": MODEL, "prompt": case.prompt, "stream": True, **case.fields}
        body["stream_options"] = {"include_usage": True}
        scored, is_done, usage = 0, False, None
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if is_done or not line.startswith("data: "):
                    continue
                is_done = line == "data: [DONE]"
                if is_done:
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    raise ValueError(f"error in the stream: {chunk['error']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    scored += len((choice["logprobs"] or {"tokens": ()})["tokens"])
                    yield Piece(choice["index"], choice["text"], 0, choice["finish_reason"])
        if not is_done or usage is None:
            raise ValueError(f"the stream ended {'without usage' if is_done else 'without [DONE]'}")
        if "logprobs" in case.fields and scored != usage["completion_tokens"]:
            raise ValueError(f"log-probabilities of {scored} tokens of {usage['completion_tokens']}")
        yield Piece(0, "", usage["completion_tokens"])

    async def gauges(self) -> dict[str, float]:
        """See ``Service``."""
        response = await self._client.get("/metrics")
        response.raise_for_status()
        found = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name in GAUGES:
                    found[" ".join((GAUGES[sample.name], *sample.labels.values()))] = sample.value
        if not {"running", "waiting", "cache target"} <= found.keys():
            raise ValueError(f"/metrics doesn't tell all of {', '.join(GAUGES)}")
        return found
