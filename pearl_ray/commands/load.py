"""Load on an OpenAI-compatible server: when each request is sent, and what its stream showed, with times.

Knows httpx and server-sent events; no figures, no terminal. Every wait and every answer is bounded.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec
import numpy as np

Endpoint = Literal["chat", "completions"]
PATHS: Mapping[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CONNECT_TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024


class BadAnswerError(Exception):
    """The server answered, but not what was asked for."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load. ``base_url`` has neither ``/v1`` nor a slash at its end."""

    base_url: str
    model: str
    endpoint: Endpoint
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Timing:
    """Bounds in seconds, and how many requests may be out at one time (None: any number)."""

    request_timeout_s: float = 600.0
    max_duration_s: float = 3600.0
    max_concurrency: int | None = None


@dataclass(slots=True)
class Answer:
    """One request as the client saw it; times in seconds since it was sent.

    Attributes:
        started: when it was sent, in seconds since the load began.
        arrivals: when each chunk with text came.
        num_tokens: tokens in each of those chunks; sums to ``output_tokens``.
        e2e: when the stream ended.
        error: why it counts as failed; None if it succeeded.
        has_usage: whether the server counted the tokens; otherwise each chunk counts as one, the prompt as none.
    """

    started: float
    arrivals: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    e2e: float = 0.0
    error: str | None = None
    has_usage: bool = False

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text; None if there was none."""
        return self.arrivals[0] if self.arrivals else None

    def inter_chunk(self) -> list[float]:
        """Seconds between two successive chunks with text."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def inter_token(self) -> list[float]:
        """Seconds per token behind the first chunk: tokens that came together share the time since the last ones."""
        found: list[float] = []
        last = self.arrivals[0] if self.arrivals else 0.0
        for when, count in zip(self.arrivals[1:], self.num_tokens[1:], strict=True):
            if count:
                found += [(when - last) / count] * count
                last = when
        return found

    def tpot(self) -> float | None:
        """Seconds per output token behind the first one, on average; None if there is only one."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)


def send_times(count: int, rate: float, burstiness: float, generator: np.random.Generator) -> list[float]:
    """When to send each request, in seconds; the first at 0.

    Args:
        rate: requests per second; infinite: all at once.
        burstiness: shape of the gamma distribution of the intervals, as vLLM's; 1: Poisson, infinite: all the same.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [i / rate for i in range(count)]
    intervals = generator.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=max(count - 1, 0))
    return [0.0, *np.cumsum(intervals).tolist()][:count]


def share_tokens(num_chars: Sequence[int], total: int) -> list[int]:
    """Tokens per chunk by its share of the text, for servers that only tell their sum; at least one in the first."""
    all_chars, seen, given = sum(num_chars), 0, 0
    shares = []
    for number, chars in enumerate(num_chars):
        seen += chars
        upto = round(total * seen / all_chars)
        if number == 0:
            upto = max(upto, min(total, 1))
        shares.append(max(upto - given, 0))
        given = max(upto, given)
    return shares


def body_of(target: Target, prompt: str | list[int], max_tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The request's body; ``extra`` wins over what is set here."""
    text: dict[str, Any] = {"prompt": prompt}
    if target.endpoint == "chat":
        text = {"messages": [{"role": "user", "content": prompt}]}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": target.model, **text, "max_tokens": max_tokens, **stream, **extra}


def new_client(target: Target) -> httpx.AsyncClient:
    """No proxies and no redirects: the load goes where it was told to."""
    headers = {"Accept-Encoding": "identity"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(
        base_url=target.base_url,
        headers=headers,
        limits=limits,
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


async def send_all(
    target: Target,
    bodies: Sequence[Mapping[str, Any]],
    times: Sequence[float],
    timing: Timing,
    on_answer: Callable[[Answer], object] = lambda _: None,
) -> tuple[list[Answer], float]:
    """Send each body at its time; returns the answers in the bodies' order, and the seconds until the last one ended.

    Where no more may be out, a request waits its turn and is timed from when it is really sent.
    """
    room = asyncio.Semaphore(timing.max_concurrency or len(bodies) or 1)
    answers = [Answer(0.0, error="not sent: --max-duration was over") for _ in bodies]
    async with new_client(target) as client:
        began = time.perf_counter()

        async def one(number: int) -> None:
            await asyncio.sleep(max(times[number] - (time.perf_counter() - began), 0.0))
            async with room:
                answers[number] = Answer(time.perf_counter() - began)
                await _ask(client, target, bodies[number], timing.request_timeout_s, answers[number])
            on_answer(answers[number])

        tasks = [asyncio.create_task(one(number)) for number in range(len(bodies))]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=timing.max_duration_s)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        duration = time.perf_counter() - began
    for result in ended:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    return answers, duration


async def _ask(
    client: httpx.AsyncClient, target: Target, body: Mapping[str, Any], timeout_s: float, answer: Answer
) -> None:
    """Stream one answer and write it down, its failure too."""
    began = time.perf_counter()
    answer.error = "--max-duration was over before it ended"
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(client, target, body, answer, began)
        answer.error = None
    except TimeoutError:
        answer.error = f"no end within {timeout_s:g} s"
    except (httpx.HTTPError, BadAnswerError) as error:
        answer.error = f"{type(error).__name__}: {error}" if isinstance(error, httpx.HTTPError) else str(error)
    finally:
        answer.e2e = time.perf_counter() - began


async def _stream(
    client: httpx.AsyncClient, target: Target, body: Mapping[str, Any], answer: Answer, began: float
) -> None:
    num_chars: list[int] = []
    usage: Mapping[str, Any] | None = None
    is_done = False
    async with client.stream("POST", PATHS[target.endpoint], json=body) as response:
        if response.status_code != 200:
            raise BadAnswerError(await error_text(response))
        async for data in _events(response):
            if data == b"[DONE]":
                is_done = True
                break
            now = time.perf_counter() - began
            chunk = decoded(data)
            if chunk.get("error"):
                raise BadAnswerError(f"error in the stream: {_message(chunk)}")
            if chunk.get("usage"):
                usage = chunk["usage"]
            chars = sum(_num_chars(choice) for choice in chunk.get("choices") or ())
            if chars:
                answer.arrivals.append(now)
                num_chars.append(chars)
    if not is_done:
        raise BadAnswerError("the stream ended without [DONE]")
    answer.has_usage = usage is not None
    if usage is None:
        answer.num_tokens, answer.output_tokens = [1] * len(num_chars), len(num_chars)
    else:
        answer.input_tokens = int(usage.get("prompt_tokens") or 0)
        answer.output_tokens = int(usage.get("completion_tokens") or 0)
        answer.num_tokens = share_tokens(num_chars, answer.output_tokens)


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each server-sent event of one line, which is how all servers of this API send them.

    ``aiter_lines`` would also split at U+2028 and its like, which JSON may hold as they are.
    """
    rest, size = b"", 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise BadAnswerError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def decoded(data: bytes | str) -> dict[str, Any]:
    """A JSON object; raises ``BadAnswerError`` if it is none."""
    try:
        chunk = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        chunk = None
    if not isinstance(chunk, dict):
        raise BadAnswerError(f"no JSON object: {data[:80]!r}")
    return chunk


def _num_chars(choice: Mapping[str, Any]) -> int:
    """Characters of a chunk's text, whichever way the server sends it."""
    delta = choice.get("delta") or {}
    texts = [choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning")]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        texts += [function.get("name"), function.get("arguments")]
    return sum(len(text) for text in texts if isinstance(text, str))


def _message(content: Mapping[str, Any]) -> str:
    error = content.get("error", content)
    return str(error.get("message", error) if isinstance(error, dict) else error)


async def error_text(response: httpx.Response) -> str:
    """Status and message of an answer that isn't 200, in one line."""
    text = (await response.aread())[:4096].decode("utf-8", "replace")
    try:
        content = msgspec.json.decode(text)
    except msgspec.DecodeError:
        content = text
    told = _message(content) if isinstance(content, dict) else str(content)
    return " ".join(f"HTTP {response.status_code}: {told}".split())[:300]
