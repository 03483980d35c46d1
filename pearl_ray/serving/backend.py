"""The engine as the server sees it: one client of the coordinator, one poll loop, one queue per HTTP request.

:class:`Backend` sorts what comes from the coordinator to whoever waits for it. What it needs of the coordinator is
:class:`Engine`, five calls; :class:`RayEngine` makes them through Ray. Knows no HTTP, and models only by a tokenizer.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from pearl_ray.actors.clients import Batch
from pearl_ray.core.errors import EngineDeadError, PearlError
from pearl_ray.core.params import SamplingParams

logger = logging.getLogger(__name__)

POLL_S = 10.0
STATUS_TIMEOUT_S = 5.0


class Tokenizer(Protocol):
    """What the server asks of the target's tokenizer (``pearl_ray.model.tokenizer``)."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,  # noqa: ANN401 - whatever the model's template knows
    ) -> str: ...


class Engine(Protocol):
    """What the server asks of the coordinator; see ``CoordinatorActor`` for the meanings."""

    async def submit(
        self, client_id: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> None: ...

    async def next_batch(self, client_id: str, timeout_s: float) -> Batch: ...

    async def abort(self, request_id: str) -> None: ...

    async def stats(self) -> Mapping[str, Any]: ...

    async def status(self) -> Mapping[str, Any]: ...


class RayEngine:
    """The coordinator actor of a deployment."""

    def __init__(self, coordinator: ActorHandle[Any]) -> None:
        self._coordinator = coordinator

    async def submit(
        self, client_id: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams], request_ids: Sequence[str]
    ) -> None:
        await self._call("submit", client_id, list(prompts), list(params), list(request_ids))

    async def next_batch(self, client_id: str, timeout_s: float) -> Batch:
        batch = await self._call("next_batch", client_id, timeout_s)
        assert isinstance(batch, Batch)
        return batch

    async def abort(self, request_id: str) -> None:
        await self._call("abort", request_id)

    async def stats(self) -> Mapping[str, Any]:
        return dict(await self._call("stats"))

    async def status(self) -> Mapping[str, Any]:
        return dict(await self._call("status"))

    async def _call(self, method: str, *args: object) -> Any:  # noqa: ANN401 - each caller knows its own
        try:
            return await getattr(self._coordinator, method).remote(*args)
        except PearlError:
            raise  # an awaited Ray error is an instance of its cause too
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PearlError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise EngineDeadError("the deployment is gone: its coordinator died or was stopped") from error


@dataclass(frozen=True, slots=True)
class Model:
    """What the server knows of the model it serves; ``max_model_len`` in tokens."""

    tokenizer: Tokenizer
    max_model_len: int


class Stream:
    """What comes for the engine requests of one HTTP request; iterating ends when all of them have ended.

    Raises (while iterating):
        PearlError: the engine failed, or the server ends.
    """

    def __init__(self, request_ids: Sequence[str]) -> None:
        self.unfinished = set(request_ids)
        self._queue: asyncio.Queue[Batch | Exception] = asyncio.Queue()

    def put(self, item: Batch | Exception) -> None:
        """Hand over what one round, or an end of everything, brought for this stream."""
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Batch]:
        while self.unfinished:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            self.unfinished.difference_update(output.request_id for output in item.finished)
            yield item


class Backend:
    """See the module. Everything but the attributes that are only read is called from the server's event loop.

    Attributes:
        phase: what the deployment is doing while it isn't attached yet.
        model: None until :meth:`attach`.
        failure: why the engine will never answer again; None while it may.
        failed: set along with ``failure``.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.model: Model | None = None
        self.failure: PearlError | None = None
        self.failed = asyncio.Event()
        self._engine: Engine | None = None
        self._client_id = f"http-{uuid.uuid4().hex}"
        self._streams: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life -------------------------------------------------------------------------------------------------------

    def attach(self, engine: Engine, model: Model) -> None:
        """The deployment is up: requests are taken from now on."""
        assert self._engine is None
        self._engine, self.model = engine, model
        self._spawn(self._poll(engine))

    def close(self) -> None:
        """End the poll loop; nothing comes any more."""
        for task in list(self._tasks):
            task.cancel()

    def fail_all(self, error: Exception) -> None:
        """End every stream with an error, and its requests with it."""
        for stream in set(self._streams.values()):
            stream.put(error)

    async def why_not_ready(self) -> str | None:
        """None while requests are answered, else what is being waited for, or what went wrong."""
        if self.failure is not None:
            return str(self.failure)
        if self._engine is None:
            return self.phase
        try:
            status = await asyncio.wait_for(self._engine.status(), STATUS_TIMEOUT_S)
        except TimeoutError:
            return f"the coordinator hasn't answered for {STATUS_TIMEOUT_S:g} s"
        except PearlError as error:
            return str(error)
        state = str(status["state"])
        return None if state == "ready" else f"{state}: {status['error']}" if status.get("error") else state

    # -- requests ---------------------------------------------------------------------------------------------------

    async def submit(self, request_ids: Sequence[str], prompts: Sequence[list[int]], params: SamplingParams) -> Stream:
        """Queue one request per prompt, all or none; to be ended by :meth:`release`.

        Raises:
            PearlError: what the coordinator refused them for.
        """
        engine = self._ready()
        stream = Stream(request_ids)
        self._streams.update((request_id, stream) for request_id in request_ids)
        call = asyncio.ensure_future(engine.submit(self._client_id, prompts, [params] * len(prompts), request_ids))
        try:
            await asyncio.shield(call)
        except BaseException as error:
            for request_id in request_ids:
                self._streams.pop(request_id, None)
            if isinstance(error, asyncio.CancelledError):  # whoever wanted it is gone, but it may be queued by now
                call.add_done_callback(lambda _call: self._spawn(self._abort(engine, list(request_ids))))
            raise
        return stream

    def release(self, stream: Stream, request_ids: Sequence[str]) -> None:
        """Nobody waits for these any more; what still runs of them is aborted."""
        for request_id in request_ids:
            self._streams.pop(request_id, None)
        if stream.unfinished and self._engine is not None and self.failure is None:
            self._spawn(self._abort(self._engine, sorted(stream.unfinished)))

    async def stats(self) -> Mapping[str, Any]:
        """The coordinator's figures; empty while there is none to ask."""
        if self._engine is None or self.failure is not None:
            return {}
        try:
            return await asyncio.wait_for(self._engine.stats(), STATUS_TIMEOUT_S)
        except (PearlError, TimeoutError) as error:
            logger.warning("no figures from the coordinator: %s", error)
            return {}

    def _ready(self) -> Engine:
        if self.failure is not None:
            raise self.failure
        if self._engine is None:
            raise EngineDeadError(f"the deployment isn't up yet: {self.phase}")
        return self._engine

    # -- the poll loop ----------------------------------------------------------------------------------------------

    async def _poll(self, engine: Engine) -> None:
        try:
            while True:
                self._dispatch(await engine.next_batch(self._client_id, POLL_S))
        except PearlError as error:
            self._fail(error)
        except ray.exceptions.RayError as error:
            self._fail(EngineDeadError(f"the coordinator can't be reached: {error}"))

    def _dispatch(self, batch: Batch) -> None:
        """One queue item per stream and poll, however many tokens it has."""
        parts: dict[Stream, Batch] = {}
        for update in batch.updates:
            stream = self._streams.get(update.request_id)
            if stream is not None:
                parts.setdefault(stream, Batch()).updates.append(update)
        for output in batch.finished:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                parts.setdefault(stream, Batch()).finished.append(output)
        for stream, part in parts.items():
            stream.put(part)

    def _fail(self, error: PearlError) -> None:
        logger.error("the engine has ended: %s", error)
        self.failure = error
        self.failed.set()
        self.fail_all(error)

    async def _abort(self, engine: Engine, request_ids: Sequence[str]) -> None:
        try:
            for request_id in request_ids:
                await engine.abort(request_id)
        except (PearlError, ray.exceptions.RayError) as error:
            logger.warning("could not abort: %s", error)  # a dead engine runs nothing

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the server failed", exc_info=error)
            self._fail(EngineDeadError(f"the server's poll loop failed: {error!r}"))
