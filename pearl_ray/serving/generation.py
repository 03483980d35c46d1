"""One HTTP request's generating: let in, submitted, timed, given out round by round, and ended whatever happens.

Knows prompts as token ids and answers as the engine's; how they are written is `completions` and `chat`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from pearl_ray.core.outputs import RequestOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.requests import Update
from pearl_ray.serving.backend import Backend, Model, Stream
from pearl_ray.serving.errors import ApiError, unavailable
from pearl_ray.serving.limits import Gate
from pearl_ray.serving.metrics import Metrics
from pearl_ray.serving.settings import ServerSettings
from pearl_ray.serving.tools import Dialect, dialect_of

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up: there is nobody to answer."""


@dataclass(slots=True)
class Services:
    """What the routes of one app share."""

    settings: ServerSettings
    backend: Backend
    gate: Gate
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    _dialect: Dialect | None = None

    @staticmethod
    def now() -> int:
        """Seconds since 1970, for ``created``."""
        return int(time.time())

    def model(self) -> Model:
        """The model that is served; raises ``ApiError`` (503) while none is."""
        if self.backend.failure is not None:
            raise self.backend.failure
        if self.backend.model is None:
            raise unavailable(f"the model isn't loaded yet: {self.backend.phase}", "loading")
        return self.backend.model

    def dialect(self) -> Dialect:
        """How the model is told of tools and calls them; raises ``ApiError`` (503) while there is no model."""
        if self._dialect is None:
            self._dialect = dialect_of(self.model().tokenizer, self.settings.tool_call_parser)
        return self._dialect

    def name_of(self, wanted: str | None) -> str:
        """The model's name for the answer; raises ``ApiError`` (404) if the request wants another one."""
        names = self.settings.served_model_names
        if wanted is None:
            return names[0]
        if wanted not in names:
            raise ApiError(404, f"the model {wanted!r} does not exist", param="model", code="model_not_found")
        return wanted


class Generation:
    """Made by :meth:`start`; must be closed. Choices are numbered prompt by prompt, ``n`` to each."""

    def __init__(
        self,
        services: Services,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        kind: str,
        log: MutableMapping[str, object],
        began: float | None,
        is_measured: bool,
    ) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.prompts, self.params = prompts, params
        self.outputs: dict[str, RequestOutput] = {}
        self._services = services
        self._request_ids = [f"{self.id}-{index}" for index in range(len(prompts))]
        self._first_choice = {request_id: i * params.n for i, request_id in enumerate(self._request_ids)}
        self._stream: Stream | None = None
        self.began = time.monotonic() if began is None else began
        self._last: dict[int, float] = {}  # choice -> when its newest tokens came
        self._num_tokens = 0
        self._closed = False
        self._is_measured = is_measured
        self._log = log
        log.update(request_id=self.id, prompt_tokens=sum(map(len, prompts)))

    @classmethod
    async def start(
        cls,
        services: Services,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        kind: str,
        log: MutableMapping[str, object],
        *,
        began: float | None = None,
        is_measured: bool = True,
    ) -> Generation:
        """Submit it.

        Args:
            log: what will be said of it in the log.
            began: since when latencies are counted (``time.monotonic()``); None: since now.
            is_measured: whether they are counted at all.

        Raises:
            ApiError, PearlError: nothing was started.
        """
        generation = cls(services, prompts, params, kind, log, began, is_measured)
        services.gate.enter()
        try:
            generation._stream = await services.backend.submit(generation._request_ids, prompts, params)
        except BaseException:
            generation.close()
            raise
        return generation

    async def rounds(self) -> AsyncIterator[list[tuple[int, Update]]]:
        """What each round brought: choices and their new tokens."""
        assert self._stream is not None
        async for batch in self._stream:
            self.outputs.update((output.request_id, output) for output in batch.finished)
            updates = [(self._first_choice[u.request_id] + u.index, u) for u in batch.updates]
            now = time.monotonic()
            for choice, update in updates:
                self._observe(choice, len(update.token_ids), now)
            if updates:
                yield updates
        if self._is_measured:
            self._services.metrics.e2e_latency.observe(time.monotonic() - self.began)

    async def results(self) -> list[RequestOutput]:
        """The finished outputs, one per prompt."""
        async for _ in self.rounds():
            pass
        return self.finished()

    def finished(self) -> list[RequestOutput]:
        """The outputs in the prompts' order, once all have ended."""
        return [self.outputs[request_id] for request_id in self._request_ids]

    def _observe(self, choice: int, num_tokens: int, now: float) -> None:
        if not num_tokens:
            return
        self._num_tokens += num_tokens
        if not self._is_measured:
            return
        metrics = self._services.metrics
        last = self._last.get(choice)
        if not self._last:
            metrics.time_to_first_token.observe(now - self.began)
        if last is not None:
            for _ in range(num_tokens):
                metrics.inter_token_latency.observe((now - last) / num_tokens)
        self._last[choice] = now

    def close(self) -> None:
        """Give back its place; what still runs of it is aborted. Does no harm a second time."""
        if self._closed:
            return
        self._closed = True
        self._log["completion_tokens"] = self._num_tokens
        self._services.gate.leave()
        if self._stream is not None:
            self._services.backend.release(self._stream, self._request_ids)


async def unless_client_goes(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client hangs up.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
