"""Who waits for which request's tokens: one stream of batches per client, whatever number of requests it has.

A client asks for its next batch and gets all that came since the last. Knows requests; nothing of Ray or rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from pearl_ray.core.errors import PearlError
from pearl_ray.core.outputs import RequestOutput
from pearl_ray.core.requests import Request, Update

SILENCE_S = 30.0  # a client that hasn't asked for this long is gone


@dataclass(slots=True)
class Batch:
    """What came for a client: new tokens in order, and the outputs of requests that ended."""

    updates: list[Update] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)


@dataclass(slots=True)
class _Client:
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    batch: Batch = field(default_factory=Batch)
    requests: set[str] = field(default_factory=set)
    asked_at: float = field(default_factory=time.monotonic)


class Clients:
    """The streams of all clients."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._requests: dict[str, tuple[str, Request]] = {}
        self._failure: PearlError | None = None

    def add(self, client_id: str, request: Request) -> None:
        """A client's request was queued."""
        self._clients.setdefault(client_id, _Client()).requests.add(request.request_id)
        self._requests[request.request_id] = (client_id, request)

    def forget(self, request_id: str) -> None:
        """Drop a request without telling anybody."""
        owner = self._requests.pop(request_id, None)
        if owner is not None:
            self._clients[owner[0]].requests.discard(request_id)

    def deliver(self, updates: Iterable[Update]) -> None:
        """Put new tokens into their clients' next batches, and behind them the outputs of requests that ended."""
        ended: dict[str, tuple[_Client, Request]] = {}
        for update in updates:
            owner = self._requests.get(update.request_id)
            if owner is None:
                continue
            client_id, request = owner
            client = self._clients[client_id]
            client.batch.updates.append(update)
            if request.finished:
                ended[update.request_id] = client, request  # updates of its other answers may follow
            client.arrived.set()
        for request_id, (client, request) in ended.items():
            client.batch.finished.append(request.output())
            self.forget(request_id)

    async def next_batch(self, client_id: str, timeout_s: float) -> Batch:
        """The client's batch, waiting for something to come; may be empty after ``timeout_s``."""
        client = self._clients.setdefault(client_id, _Client())
        client.asked_at = float("inf")  # while it waits it isn't silent
        try:
            if not client.arrived.is_set() and self._failure is None:
                await asyncio.wait_for(client.arrived.wait(), timeout_s)
        except TimeoutError:
            pass
        finally:
            client.asked_at = time.monotonic()
        client.arrived.clear()
        batch, client.batch = client.batch, Batch()
        if self._failure is not None and not batch.finished:
            raise self._failure
        return batch

    def drop(self, client_id: str) -> list[str]:
        """Forget a client; returns its unfinished requests."""
        client = self._clients.pop(client_id, None)
        unfinished = sorted(client.requests) if client is not None else []
        for request_id in unfinished:
            del self._requests[request_id]
        return unfinished

    def drop_silent(self, now: float) -> list[str]:
        """Forget the clients that haven't asked for long; returns their unfinished requests."""
        silent = [client_id for client_id, client in self._clients.items() if now - client.asked_at > SILENCE_S]
        return [request_id for client_id in silent for request_id in self.drop(client_id)]

    def fail(self, error: PearlError) -> None:
        """Every waiting and later call raises ``error``."""
        self._failure = error
        for client in self._clients.values():
            client.arrived.set()
