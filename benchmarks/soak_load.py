"""The load of the soak, and its checks: texts as alone, hang-ups, blocks that come back. Knows no engine, only streams.

Two thirds of the time every kind of request is asked for; each third wave is plain requests only, few enough that a GPU
queues their rounds ahead.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.soak_cases import LONG_TOKENS, PROMPTS, Case
from benchmarks.soak_memory import Memory

REQUEST_TIMEOUT_S = 180.0
FREED_WITHIN_S = 15.0
WAVE_S = 10.0
PLAIN_STREAMS = 24  # at windows of 4, 120 rows: a pass that is queued ahead has at most 128
TELL_S = 30.0
MOST_FAILURES = 200  # nothing more is learnt from an engine that is down


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of one answer: text and its number of tokens; ``reason`` with the last piece of each answer."""

    index: int
    text: str
    num_tokens: int
    reason: str | None = None


class Service(Protocol):
    """What is soaked; over HTTP or directly.

    Attributes:
        errors: what a stream that is lost raises, beside ValueError and TimeoutError.
    """

    errors: tuple[type[Exception], ...]

    def stream(self, case: Case) -> AsyncGenerator[Piece]:
        """Ask, and get the answer piece by piece; closing the generator hangs up."""
        ...

    async def gauges(self) -> dict[str, float]:
        """What runs, what waits, and the part of each cache that is held; all 0 where nothing is asked for."""
        ...


@dataclass(slots=True)
class Tally:
    """What the streams came to; ``failures`` are told, the first of them in full."""

    whole: Counter[str] = field(default_factory=Counter)
    hung_up: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


async def ask(service: Service, case: Case, num_pieces: int | None = None) -> tuple[list[str], int, bool]:
    """The texts of the answers, the number of tokens, and whether it came whole or was hung up on.

    Args:
        num_pieces: hang up behind so many; None: don't.

    Raises:
        ValueError, TimeoutError, or one of ``service.errors``: the stream is lost.
    """
    count = case.fields.get("n", 1)
    texts, ended = [""] * count, [False] * count
    pieces = tokens = 0
    async with asyncio.timeout(REQUEST_TIMEOUT_S), aclosing(service.stream(case)) as stream:
        async for piece in stream:
            if ended[piece.index] and piece.text:
                raise ValueError(f"answer {piece.index} went on behind its end")
            texts[piece.index] += piece.text
            tokens += piece.num_tokens
            ended[piece.index] |= piece.reason is not None
            if piece.reason not in (None, "stop", "length"):
                raise ValueError(f"answer {piece.index} ended by {piece.reason!r}")
            pieces += 1
            if pieces == num_pieces:
                return texts, tokens, False
    if not all(ended):
        raise ValueError("the stream ended before its answers did")
    return texts, tokens, True


def losses(service: Service) -> tuple[type[Exception], ...]:
    """What a lost stream raises."""
    return (*service.errors, TimeoutError, ValueError)


async def alone(service: Service, cases: Sequence[Case], failures: list[str]) -> dict[Case, list[str]]:
    """The texts of each request while nothing else runs; those that fail, or don't repeat their text, are left out."""
    found: list[dict[Case, list[str]]] = [{}, {}]
    for texts in found:
        for case in cases:
            try:
                texts[case] = (await ask(service, case))[0]
            except losses(service) as error:
                failures.append(f"alone ({case.kind}): lost: {case.fields}: {error!r}")
    once, again = found
    for case in [case for case in once if case in again]:
        if case.is_repeatable and once[case] != again[case]:
            failures.append(f"alone ({case.kind}): {case.fields}: {once[case]!r}, then {again.pop(case)!r}")
    return {case: once[case] for case in again if case in once}


async def keep_asking(
    service: Service,
    cases: Sequence[Case],
    expected: Sequence[Sequence[str]],
    number: int,
    began: float,
    seconds: float,
    hang_up: float,
    draw: random.Random,
    tally: Tally,
) -> None:
    """One stream after the other until the time is over; a part of them is hung up on."""
    plain = [i for i, case in enumerate(cases) if case.is_plain] or list(range(len(cases)))
    while (now := time.monotonic() - began) < seconds and len(tally.failures) < MOST_FAILURES:
        is_plain_wave = int(now / WAVE_S) % 3 == 2
        if is_plain_wave and number >= PLAIN_STREAMS:
            await asyncio.sleep(0.2)
            continue
        which = draw.choice(plain) if is_plain_wave else draw.randrange(len(cases))
        case, right = cases[which], expected[which]
        num_pieces = draw.randint(1, 8) if draw.random() < hang_up else None
        try:
            texts, tokens, is_whole = await ask(service, case, num_pieces)
        except losses(service) as error:
            tally.failures.append(f"lost: {case.kind} request {which}: {error!r}")
            await asyncio.sleep(0.1)
            continue
        tally.tokens += tokens
        if is_whole:
            tally.whole[case.kind] += 1
        else:
            tally.hung_up += 1
        if case.is_repeatable and not is_right(texts, right, is_whole):
            tally.failures.append(f"mixed ({case.kind}): request {which}: {texts!r} instead of {right!r}")


def is_right(texts: Sequence[str], expected: Sequence[str], is_whole: bool) -> bool:
    """Whether these are the texts, or where somebody hung up, their beginnings."""
    return all(t == e if is_whole else e.startswith(t) for t, e in zip(texts, expected, strict=True))


async def until_idle(service: Service, what: str, failures: list[str]) -> None:
    """Watch until nothing runs and no block is held."""
    began = time.monotonic()
    while any((now := await service.gauges()).values()):
        if time.monotonic() - began > FREED_WITHIN_S:
            failures.append(f"blocks: {what}: not free after {FREED_WITHIN_S:g} s: {now}")
            return
        await asyncio.sleep(0.05)
    print(f"{what}: all blocks free {time.monotonic() - began:.2f} s later: {now}", flush=True)


async def hang_up_at_once(service: Service, num_streams: int, failures: list[str]) -> None:
    """Long answers, all clients gone in the middle of them; their blocks must come back."""
    let_go = asyncio.Event()

    async def hold(number: int) -> None:
        wish = {"max_tokens": LONG_TOKENS, "ignore_eos": True, "temperature": 0.9, "seed": number}
        case = Case(kind="held", prompt=PROMPTS[number % len(PROMPTS)], fields=wish)
        async with aclosing(service.stream(case)) as stream:
            await anext(stream)
            await let_go.wait()

    held = [asyncio.create_task(hold(number)) for number in range(num_streams)]
    most: dict[str, float] = {}
    deadline = time.monotonic() + FREED_WITHIN_S
    while time.monotonic() < deadline and most.get("running", 0.0) < num_streams:
        most = max(most, await service.gauges(), key=lambda g: g.get("running", 0.0))
        await asyncio.sleep(0.02)
    print(f"before all hang up, most at one time: {most}", flush=True)
    if not most.get("running"):
        failures.append("blocks: no stream ran before all hung up")
    let_go.set()
    await asyncio.gather(*held, return_exceptions=True)
    await until_idle(service, f"{num_streams} clients hung up at once", failures)


async def tell(service: Service, began: float, tally: Tally, memory: Memory) -> None:
    """A line every half a minute, until cancelled."""
    while True:
        await asyncio.sleep(TELL_S)
        sums = f"{tally.whole.total()} whole, {tally.hung_up} hung up on, {len(tally.failures)} lost or mixed"
        now = ", ".join(f"{name} {value:.2g}" for name, value in (await service.gauges()).items())
        print(f"{time.monotonic() - began:5.0f} s: {sums}; {now}; MiB: {memory.newest()}", flush=True)


async def soak(
    service: Service,
    cases: Sequence[Case],
    memory: Memory,
    *,
    num_streams: int,
    seconds: float,
    hang_up: float,
    seed: int,
) -> Tally:
    """The load and all checks; prints as it goes."""
    tally = Tally()
    began = time.monotonic()
    answers = await alone(service, cases, tally.failures)
    for failure in tally.failures:
        print(failure, flush=True)
    asked, expected = list(answers), list(answers.values())
    if not asked:
        return tally
    num_texts = len({tuple(texts) for texts in expected})
    print(
        f"{num_texts} different texts of {len(cases)} requests, sent alone twice in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    began = time.monotonic()
    memory.sample(0.0)
    watching = [asyncio.create_task(memory.watch(began)), asyncio.create_task(tell(service, began, tally, memory))]
    draws = [random.Random(seed * 100_003 + number) for number in range(num_streams)]
    await asyncio.gather(
        *(
            keep_asking(service, asked, expected, number, began, seconds, hang_up, draw, tally)
            for number, draw in enumerate(draws)
        )
    )
    duration = time.monotonic() - began
    for task in watching:
        task.cancel()
    for end in await asyncio.gather(*watching, return_exceptions=True):
        if isinstance(end, Exception):
            tally.failures.append(f"watch: {end!r}")
    print(f"load of the machine (1, 5, 15 minutes): {os.getloadavg()} on {os.cpu_count()} processors", flush=True)
    print(
        f"{num_streams} streams for {duration:.0f} s: {tally.whole.total()} whole, {tally.hung_up} hung up on, "
        f"{len(tally.failures)} lost or mixed, {tally.tokens / duration:.0f} tokens/s; "
        f"whole by kind: {dict(tally.whole.most_common())}",
        flush=True,
    )
    await until_idle(service, "the streams ended", tally.failures)
    await hang_up_at_once(service, num_streams, tally.failures)
    tally.failures += memory.report(duration)
    if missing := sorted({case.kind for case in cases} - set(tally.whole)):
        tally.failures.append(f"none: no stream came whole of {', '.join(missing)}")
    return tally
