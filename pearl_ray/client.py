"""Talking to a running coordinator from Python: generate, chat, stream, abort, stats. Starts nothing, owns nothing."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NoReturn

import ray
from ray.actor import ActorHandle

from pearl_ray.actors.clients import Batch
from pearl_ray.actors.handles import COORDINATOR, find_coordinator, namespace_of
from pearl_ray.cluster.ray_session import ClusterConnectionError, RaySession, open_session
from pearl_ray.core.errors import ConfigError, DeploymentNotFoundError, EngineDeadError, PearlError
from pearl_ray.core.outputs import RequestOutput, StreamChunk
from pearl_ray.core.params import SamplingParams

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, object]]
POLL_S = 10.0


class Client:
    """A deployment as its users see it.

    Attributes:
        coordinator: the Ray actor handle; every method of it can be called with ``.remote`` directly.
    """

    def __init__(self, name: str, coordinator: ActorHandle, session: RaySession | None = None) -> None:
        self.name = name
        self.coordinator = coordinator
        self._session = session

    # -- answers ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_progress: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one or several prompts; outputs in the prompts' order.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all of them, or one per prompt.
            on_progress: called with each output as it finishes.

        Raises:
            RequestRefusedError, QueueFullError, ConfigError: nothing was started.
            EngineDeadError: a shard died.
        """
        wanted = as_prompts(prompts)
        each = as_params(params, len(wanted))
        client_id = _client_id()
        outputs: dict[str, RequestOutput] = {}
        ids = self._call("submit", client_id, wanted, each)
        try:
            while len(outputs) < len(ids):
                for output in self._next(client_id).finished:
                    outputs[output.request_id] = output
                    if on_progress is not None:
                        on_progress(output)
        finally:
            self._drop(client_id)
        return [outputs[request_id] for request_id in ids]

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> list[RequestOutput]:
        """Answer a conversation through the model's chat template; a list of one output, as vLLM's."""
        client_id = _client_id()
        ids = self._call("submit", client_id, [list(messages)], [params or SamplingParams()])
        outputs: list[RequestOutput] = []
        try:
            while len(outputs) < len(ids):
                outputs += self._next(client_id).finished
        finally:
            self._drop(client_id)
        return outputs

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Answer one prompt or conversation, chunk by chunk; closing the iterator early aborts the request."""
        client_id = _client_id()
        self._call("submit", client_id, [prompt], [params or SamplingParams()])
        return self._chunks(client_id)

    def _chunks(self, client_id: str) -> Iterator[StreamChunk]:
        try:
            while True:
                batch = self._next(client_id)
                for u in batch.updates:
                    yield StreamChunk(
                        request_id=u.request_id,
                        index=u.index,
                        text=u.text,
                        token_ids=u.token_ids,
                        origins=u.origins,
                        finished=u.finish_reason is not None,
                        finish_reason=u.finish_reason,
                    )
                if batch.finished:
                    return
        finally:
            self._drop(client_id)

    def abort(self, request_id: str) -> bool:
        """End a request; False if it isn't running."""
        return bool(self._call("abort", request_id))

    # -- state ------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, object]:
        """The figures of /metrics."""
        return dict(self._call("stats"))

    def status(self) -> dict[str, object]:
        """State, models, shards."""
        return dict(self._call("status"))

    def trace(self) -> dict[str, object]:
        """The newest rounds as a Chrome trace."""
        return dict(self._call("chrome_trace"))

    def close(self) -> None:
        """Let go of the deployment, and of Ray if :func:`connect` joined it."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- calls ------------------------------------------------------------------------------------------------------

    def _call(self, method: str, *args: object) -> object:
        try:
            return ray.get(getattr(self.coordinator, method).remote(*args))
        except ray.exceptions.RayError as error:
            raise_cause(error, self.name)

    def _next(self, client_id: str) -> Batch:
        batch = self._call("next_batch", client_id, POLL_S)
        assert isinstance(batch, Batch)
        return batch

    def _drop(self, client_id: str) -> None:
        # No waiting and no error: the deployment may be gone.
        self.coordinator.drop_client.remote(client_id)


def connect(name: str = "default", *, address: str | None = None) -> Client:
    """A client of a deployment started by ``pearl-ray serve``; joins the Ray cluster if this process hasn't.

    Raises:
        DeploymentNotFoundError: there is none of that name on the cluster.
    """
    try:
        session = open_session(address, start=False, wanted=lambda: find_coordinator(name) is not None)
    except ClusterConnectionError as error:
        raise DeploymentNotFoundError(f"no deployment {name!r}: {error}") from error
    coordinator = find_coordinator(name)
    if coordinator is None:
        session.close()
        raise DeploymentNotFoundError(
            f"no deployment {name!r} on this Ray cluster (no actor {COORDINATOR!r} in namespace "
            f"{namespace_of(name)!r}); start one with: pearl-ray serve --name {name}"
        )
    return Client(name, coordinator, session)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One per prompt.

    Raises:
        ConfigError: a list of another length.
    """
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    each = list(params)
    if len(each) != count:
        raise ConfigError("sampling_params", f"a list of {len(each)}", f"one, or a list of one per prompt ({count})")
    return each


def raise_cause(error: ray.exceptions.RayError, name: str) -> NoReturn:
    """Turn Ray's wrapping of an error into the error itself, and a dead coordinator into `EngineDeadError`."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, PearlError):
        raise error.cause from None
    if isinstance(error, ray.exceptions.RayActorError):
        raise EngineDeadError(f"deployment {name!r} is gone: its coordinator died or was stopped") from error
    raise error


def _client_id() -> str:
    return f"client-{uuid.uuid4().hex}"
