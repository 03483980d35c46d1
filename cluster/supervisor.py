"""Watches actors through their long-running calls.

Knows names and awaitables: a Ray ``ObjectRef`` is one, and so is an asyncio future. Knows nothing of what the calls do,
or of what to do when one ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a watched call: ``error`` is what it raised (Ray's, for a dead actor), None if it simply returned."""

    name: str
    error: BaseException | None


class Supervisor:
    """Watches ``running``: name to awaitable. Make and use it in one event loop."""

    def __init__(self, running: Mapping[str, Awaitable[object]] | None = None) -> None:
        self._tasks: dict[asyncio.Future[BaseException | None], str] = {}
        self._forgotten: set[asyncio.Future[BaseException | None]] = set()
        self._changed = asyncio.Event()
        for name, call in (running or {}).items():
            self.watch(name, call)

    @property
    def names(self) -> tuple[str, ...]:
        """Who is watched and not yet reported."""
        return tuple(self._tasks.values())

    def watch(self, name: str, call: Awaitable[object]) -> None:
        """Watch one more; a pending :meth:`wait_first_death` takes it in."""
        assert name not in self._tasks.values(), f"{name} is watched already"
        self._tasks[asyncio.ensure_future(_outcome(call))] = name
        self._changed.set()

    def forget(self, name: str) -> None:
        """Stop watching, e.g. before an actor is ended on purpose. Harmless if it isn't watched."""
        for task in [task for task, watched in self._tasks.items() if watched == name]:
            del self._tasks[task]
            self._forgotten.add(task)  # left to end by itself: cancelling would reach into the watched call
            task.add_done_callback(self._forgotten.discard)
        self._changed.set()

    async def wait_first_death(self) -> Death:
        """The first call that ended and wasn't reported yet; among several the one watched longest."""
        while True:
            self._changed.clear()
            changed: asyncio.Future[object] = asyncio.ensure_future(self._changed.wait())
            try:
                calls: list[asyncio.Future[Any]] = [changed, *self._tasks]
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            for task in self._tasks:
                if task.done():
                    return Death(self._tasks.pop(task), task.result())

    def close(self) -> None:
        """Stop watching all."""
        for name in self.names:
            self.forget(name)


async def _outcome(call: Awaitable[object]) -> BaseException | None:
    """None, or the error that ``call`` ended with: returned rather than raised, so that it can be reported."""
    try:
        await call
    except (Exception, asyncio.CancelledError) as error:
        return error
    return None
