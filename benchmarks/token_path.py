"""What a token costs in Python from the verdict to the socket: python -m benchmarks.token_path

A fake engine gives the real server, on a real socket, a batch per round with tokens for every stream; another process
reads. Printed is the server process's processor time per token, the fake engine and the event loop's waits included,
for 1 and 2 tokens per chunk. Exit status 1 where it is above --limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pearl_ray.actors.clients import Batch
from pearl_ray.core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Origin
from pearl_ray.core.requests import Update
from pearl_ray.serving.backend import Model
from pearl_ray.serving.server import HttpServer, bind
from pearl_ray.serving.settings import ServerSettings
from tests.serving_fakes import FakeTokenizer

MAX_MODEL_LEN = 1 << 20
TIMEOUT_S = 120.0
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class RoundEngine:
    """Gives every stream the same number of tokens each round, once all streams are there.

    Attributes:
        began, ended: the process's time, in seconds, at the first round and behind the last one's pause.
    """

    def __init__(self, num_streams: int, tokens_per_chunk: int, num_rounds: int, round_s: float) -> None:
        self._num_streams, self._per_chunk = num_streams, tokens_per_chunk
        self._num_rounds, self._round_s = num_rounds, round_s
        self._requests: list[tuple[str, list[int]]] = []
        self._full = asyncio.Event()
        self._round = 0
        self.began = self.ended = 0.0
        count = tokens_per_chunk
        origin: Origin = "post_verify"
        self._part = ((ord("w"),) * count, (origin,) * count, "w" * count)

    async def submit(
        self, client_id: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> None:
        self._requests += zip(request_ids, prompts, strict=True)
        if len(self._requests) == self._num_streams:
            self._full.set()

    async def next_batch(self, client_id: str, timeout_s: float) -> Batch:
        await self._full.wait()
        await asyncio.sleep(self._round_s)
        if self._round == self._num_rounds:
            self.ended = self.ended or time.process_time()
            await asyncio.sleep(timeout_s)
            return Batch()
        if not self._round:
            self.began = time.process_time()
        self._round += 1
        is_last = self._round == self._num_rounds
        ids, origins, text = self._part
        batch = Batch()
        for request_id, prompt in self._requests:
            reason: Any = "length" if is_last else None
            batch.updates.append(Update(request_id, 0, ids, origins, text, reason, None, None))
            if is_last:
                answer = CompletionOutput(index=0, text=text, token_ids=list(ids), finish_reason=reason)
                batch.finished.append(
                    RequestOutput(
                        request_id=request_id,
                        prompt=None,
                        prompt_token_ids=prompt,
                        outputs=[answer],
                        finished=True,
                        metrics=RequestMetrics(),
                    )
                )
        return batch

    async def abort(self, request_id: str) -> None:
        raise AssertionError(f"a client hung up: {request_id}")

    async def stats(self) -> Mapping[str, Any]:
        return {}

    async def status(self) -> Mapping[str, Any]:
        return {"state": "ready", "error": None}


def measure(endpoint: str, num_streams: int, tokens_per_chunk: int, num_rounds: int, round_s: float) -> float:
    """Microseconds of processor time per token."""
    engine = RoundEngine(num_streams, tokens_per_chunk, num_rounds, round_s)
    with HttpServer(ServerSettings(), bind("127.0.0.1", 0)) as server:
        server.attach(engine, Model(FakeTokenizer(), MAX_MODEL_LEN))
        reader = [sys.executable, "-m", "benchmarks.token_path", "--read", server.url, "--endpoint", endpoint]
        done = subprocess.run(
            [*reader, "--streams", str(num_streams)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        deadline = time.monotonic() + 10 * round_s + 1
        while not engine.ended and time.monotonic() < deadline:
            time.sleep(round_s)
    events = int(done.stdout)
    assert events == num_streams * num_rounds, f"{events} chunks arrived of {num_streams * num_rounds}"
    return (engine.ended - engine.began) / (events * tokens_per_chunk) * 1e6


async def read_streams(url: str, endpoint: str, num_streams: int) -> int:
    """Ask for so many streams at once, and count the chunks with a choice until all have ended."""
    address = urlsplit(url)
    prompt: dict[str, Any] = {"prompt": "hi"}
    if endpoint == "chat":
        prompt = {"messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps({**prompt, "stream": True, "max_tokens": 100_000}).encode()
    head = (
        f"POST {PATHS[endpoint]} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )

    async def one() -> int:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head.encode() + body)
        whole = await reader.read()
        writer.close()
        assert b" 200 OK" in whole[:40] and b"data: [DONE]" in whole[-64:], whole[:300]
        return whole.count(b'"finish_reason"')

    async with asyncio.timeout(TIMEOUT_S):
        return sum(await asyncio.gather(*(one() for _ in range(num_streams))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--round-ms", type=float, default=30.0, help="pause between two rounds")
    parser.add_argument("--endpoint", choices=list(PATHS), default="chat")
    parser.add_argument("--limit", type=float, default=150.0, help="microseconds per token")
    parser.add_argument("--read", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        print(asyncio.run(read_streams(options.read, options.endpoint, options.streams)))
        return
    print(f"load of the machine (1, 5, 15 minutes): {os.getloadavg()} on {os.cpu_count()} processors")
    print(
        f"{options.endpoint}, {options.streams} streams, {options.rounds} rounds, limit {options.limit:g} us per token"
    )
    worst = 0.0
    for tokens_per_chunk in (1, 2):
        cost = measure(options.endpoint, options.streams, tokens_per_chunk, options.rounds, options.round_ms / 1e3)
        worst = max(worst, cost)
        print(f"{tokens_per_chunk} token(s) per chunk: {cost:.1f} us per token", flush=True)
    sys.exit(worst > options.limit)


if __name__ == "__main__":
    main()
