"""Many streams at once for minutes, none lost, none mixed, nothing leaked: python -m benchmarks.soak

The tiny pair on a Ray of its own behind the real HTTP server. Each stream's text must be that of the same request sent
alone; some clients hang up on the way, and at the end all of them at once, and their cache blocks must come back.
Memory of every process is printed; between the second minute and the end none may grow by more than a tenth.
Exit status 1 if anything of this fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families

from pearl_ray.cluster.ray_session import open_session
from pearl_ray.config import PearlConfig
from pearl_ray.deployment import deploy
from pearl_ray.model.loading import model_path
from pearl_ray.model.tokenizer import load_tokenizer
from pearl_ray.running import stop_deployment
from pearl_ray.serving.http_actor import start_http_actor
from pearl_ray.serving.http_handle import find_http_actor
from pearl_ray.serving.settings import ServerSettings
from tests.tiny import tiny_pair

NAME = "soak"
MODEL = "tiny"
PROMPTS = (
    "Once upon a time",
    "Tell me of the rain in spain",
    "hello",
    "There was a king who had 3 daughters, and each of them",
    "Why is it so dark here?",
    "a b c d e f g",
)
SEEDS = (1, 2, 3)
LONG_TOKENS = 400  # of an answer that is to be hung up on
REQUEST_TIMEOUT_S = 180.0
FREED_WITHIN_S = 15.0
SAMPLE_S = 1.0
MINUTE_S = 60.0
BASELINE_S = (60.0, 120.0)  # the second minute
MEMORY_GROWTH = 1.10
JUDGED_FROM_S = 180.0  # a shorter run is over before memory is level
IDLE = ("pearl:num_requests_running", "pearl:num_requests_waiting", "pearl:kv_cache_usage_perc")


@dataclass(slots=True)
class Tally:
    """What the streams came to; ``failures`` are told, the first of them in full."""

    whole: int = 0
    hung_up: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


def cases() -> list[dict[str, Any]]:
    """Requests that have one right answer each: greedy, or with a seed; of several lengths."""
    found: list[dict[str, Any]] = []
    for number, prompt in enumerate(PROMPTS):
        base = {"model": MODEL, "prompt": prompt, "max_tokens": 16 + 12 * number}
        found.append({**base, "temperature": 0})
        found += [{**base, "temperature": 0.8 + 0.1 * seed, "seed": seed} for seed in SEEDS]
    return found


async def alone(client: httpx.AsyncClient, requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of each request while nothing else runs."""
    texts = []
    for request in requests:
        response = await client.post("/v1/completions", json=request)
        response.raise_for_status()
        texts.append(response.json()["choices"][0]["text"])
    return texts


async def stream(client: httpx.AsyncClient, request: Mapping[str, Any], num_chunks: int | None) -> tuple[str, bool]:
    """The text, and whether it came whole; with ``num_chunks`` the client hangs up behind so many.

    Raises:
        httpx.HTTPError, TimeoutError, ValueError: the stream is lost.
    """
    text, chunks, reason = "", 0, None
    async with (
        asyncio.timeout(REQUEST_TIMEOUT_S),
        client.stream("POST", "/v1/completions", json={**request, "stream": True}) as response,
    ):
        if response.status_code != 200:
            raise ValueError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                if reason is None:
                    raise ValueError("[DONE] came before a finish_reason")
                return text, True
            chunk = msgspec.json.decode(line[6:])
            if "error" in chunk:
                raise ValueError(f"error in the stream: {chunk['error']}")
            text += chunk["choices"][0]["text"]
            reason = chunk["choices"][0]["finish_reason"] or reason
            chunks += 1
            if chunks == num_chunks:
                return text, False
    raise ValueError("the stream ended without [DONE]")


async def keep_asking(
    client: httpx.AsyncClient,
    requests: Sequence[Mapping[str, Any]],
    expected: Sequence[str],
    until: float,
    hang_up: float,
    draw: random.Random,
    tally: Tally,
) -> None:
    """One stream after the other until the time is over; a part of them is hung up on."""
    while time.monotonic() < until:
        number = draw.randrange(len(requests))
        num_chunks = draw.randint(1, 8) if draw.random() < hang_up else None
        try:
            text, is_whole = await stream(client, requests[number], num_chunks)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            tally.failures.append(f"lost: request {number}: {error!r}")
            await asyncio.sleep(0.1)
            continue
        tally.tokens += len(text)  # the tiny tokenizer's tokens are characters
        if is_whole:
            tally.whole += 1
        else:
            tally.hung_up += 1
        right = text == expected[number] if is_whole else expected[number].startswith(text)
        if not right:
            tally.failures.append(f"mixed: request {number}: {text!r} instead of {expected[number]!r}")


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """What /metrics says of running, waiting and cache, labels in brackets."""
    response = await client.get("/metrics")
    response.raise_for_status()
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name in IDLE:
                labels = ",".join(sample.labels.values())
                found[f"{sample.name}[{labels}]" if labels else sample.name] = sample.value
    return found


async def until_idle(client: httpx.AsyncClient, what: str, failures: list[str]) -> None:
    """Watch /metrics until nothing runs and no block is held."""
    began = time.monotonic()
    while any((now := await gauges(client)).values()):
        if time.monotonic() - began > FREED_WITHIN_S:
            failures.append(f"{what}: not free after {FREED_WITHIN_S:g} s: {now}")
            return
        await asyncio.sleep(0.05)
    if len(now) < len(IDLE):
        failures.append(f"{what}: /metrics doesn't tell all of {', '.join(IDLE)}")
    print(f"{what}: all blocks free {time.monotonic() - began:.2f} s later: {now}", flush=True)


async def hang_up_at_once(url: str, num_streams: int, failures: list[str]) -> None:
    """Long answers, all clients gone in the middle of them; their blocks must come back."""
    async with new_client(url) as client:
        long = {"model": MODEL, "max_tokens": LONG_TOKENS, "ignore_eos": True, "temperature": 0.9}
        ended = asyncio.Event()

        async def hold(number: int) -> None:
            request = {**long, "prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "stream": True}
            async with client.stream("POST", "/v1/completions", json=request) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        await ended.wait()
                        return

        held = [asyncio.create_task(hold(number)) for number in range(num_streams)]
        most: dict[str, float] = {}
        deadline = time.monotonic() + FREED_WITHIN_S
        async with new_client(url) as watcher:
            while time.monotonic() < deadline:
                now = await gauges(watcher)
                most = max(most, now, key=lambda g: g.get(IDLE[0], 0.0))
                if most.get(IDLE[0], 0.0) >= num_streams:
                    break
                await asyncio.sleep(0.02)
            print(f"before all hang up, most at one time: {most}", flush=True)
            if not most.get(IDLE[0]):
                failures.append("no stream ran before all hung up")
            ended.set()
            await asyncio.gather(*held, return_exceptions=True)
            await until_idle(watcher, f"{num_streams} clients hung up at once", failures)


class Memory:
    """Resident memory of processes by role, in MiB, over time."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._processes = {role: psutil.Process(pid) for role, pid in pids.items()}
        self.samples: list[tuple[float, dict[str, float]]] = []

    def sample(self, now: float) -> None:
        """Add one, ``now`` seconds after the start of the load."""
        rss = {role: process.memory_info().rss / 2**20 for role, process in self._processes.items()}
        self.samples.append((now, rss))

    async def watch(self, began: float) -> None:
        """Sample until cancelled."""
        while True:
            self.sample(time.monotonic() - began)
            await asyncio.sleep(SAMPLE_S)

    def between(self, role: str, start: float, end: float) -> float:
        """Median over a time."""
        return statistics.median(rss[role] for when, rss in self.samples if start <= when <= end)

    def report(self, duration: float, failures: list[str]) -> None:
        """Print start, middle and end; a long run must be level from its second minute on."""
        is_judged = duration >= JUDGED_FROM_S
        first, last = BASELINE_S if is_judged else (duration / 3, duration * 2 / 3)
        print(f"\nRSS in MiB        start  {MINUTE_S:3.0f} s   {first:4.0f}-{last:.0f} s      end   growth since")
        for role in self._processes:
            start = self.samples[0][1][role]
            middle = self.between(role, first, last)
            minute = self.between(role, min(MINUTE_S, duration) - 5 * SAMPLE_S, MINUTE_S + 5 * SAMPLE_S)
            end = self.between(role, duration - max(duration / 20, 2 * SAMPLE_S), duration + SAMPLE_S)
            growth = (end / middle - 1) * 100
            print(f"{role:15} {start:7.1f} {minute:7.1f} {middle:12.1f} {end:8.1f} {growth:+9.1f} %")
            if is_judged and end > MEMORY_GROWTH * middle:
                failures.append(f"memory of the {role} grew from {middle:.1f} to {end:.1f} MiB")
        if not is_judged:
            print(f"(not judged: a run shorter than {JUDGED_FROM_S:g} s)")


def new_client(url: str) -> httpx.AsyncClient:
    """As many connections as are asked for, no proxy."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=30.0)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, trust_env=False)


def process_ids(coordinator: Any) -> dict[str, int]:  # noqa: ANN401 - Ray's handles are untyped
    """The processes behind a deployment by role."""
    status = ray.get(coordinator.status.remote())
    pids = {"coordinator": status["coordinator_pid"]}
    for shard in status["shards"]:
        pids[f"{shard['role']} shard {shard['rank']}"] = shard["pid"]
    server: Any = find_http_actor(NAME)
    pids["server"] = ray.get(server.__ray_call__.remote(lambda _: os.getpid()))
    return pids


async def soak(url: str, pids: Mapping[str, int], num_streams: int, seconds: float, hang_up: float, seed: int) -> Tally:
    """The load and all checks."""
    requests, tally = cases(), Tally()
    memory = Memory(pids)
    async with new_client(url) as client:
        expected = await alone(client, requests)
        if expected != await alone(client, requests):
            tally.failures.append("a request alone doesn't repeat its own text")
        print(f"{len(set(expected))} different texts of {len(requests)} requests, sent alone", flush=True)
        began = time.monotonic()
        watch = asyncio.create_task(memory.watch(began))
        draws = [random.Random(seed * 100_003 + number) for number in range(num_streams)]
        await asyncio.gather(
            *(keep_asking(client, requests, expected, began + seconds, hang_up, draw, tally) for draw in draws)
        )
        duration = time.monotonic() - began
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        memory.sample(duration)
        print(f"load of the machine (1, 5, 15 minutes): {os.getloadavg()} on {os.cpu_count()} processors", flush=True)
        print(
            f"{num_streams} streams for {duration:.0f} s: {tally.whole} whole, {tally.hung_up} hung up on, "
            f"{len(tally.failures)} lost or mixed, {tally.tokens / duration:.0f} tokens/s",
            flush=True,
        )
        await until_idle(client, "the streams ended", tally.failures)
    await hang_up_at_once(url, num_streams, tally.failures)
    memory.report(duration, tally.failures)
    if not tally.whole:
        tally.failures.append("no stream came whole")
    return tally


def config(target: Path, draft: Path, num_streams: int) -> PearlConfig:
    """Room for all streams at once, the long ones too."""
    blocks = num_streams * (LONG_TOKENS + 112) // 16
    return PearlConfig(
        target_model=str(target),
        draft_model=str(draft),
        dtype="float64",
        device="cpu",
        num_speculative_tokens=4,
        max_model_len=512,
        max_num_seqs=num_streams,
        max_num_batched_tokens=max(8 * num_streams, 512),
        kv_cache_blocks=blocks,
        round_timeout_s=60.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--hang-up", type=float, default=0.05, help="part of the streams that is hung up on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target, draft = tiny_pair(Path(folder))
        session = open_session("local", num_cpus=4)
        try:
            client = deploy(config(target, draft, options.streams), NAME, detached=True)
            try:
                tokenizer = load_tokenizer(model_path("target", str(target), folder))
                settings = ServerSettings(served_model_names=(MODEL,))
                url = start_http_actor(NAME, settings, "127.0.0.1", 0, tokenizer)
                pids = process_ids(client.coordinator)
                tally = asyncio.run(soak(url, pids, options.streams, options.seconds, options.hang_up, options.seed))
            finally:
                stop_deployment(NAME, timeout_s=30.0)
        finally:
            session.close()
    kinds = Counter(failure.split(":")[0] for failure in tally.failures)
    for failure in tally.failures[:10]:
        print(f"FAILED {failure}")
    print("FAILED: " + ", ".join(f"{kind} ({n})" for kind, n in kinds.items()) if kinds else "nothing lost or mixed")
    sys.exit(bool(kinds))


if __name__ == "__main__":
    main()
