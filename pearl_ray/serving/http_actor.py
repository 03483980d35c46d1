"""The HTTP server of a detached deployment: a Ray actor around `HttpServer` that lives as long as the coordinator.

It runs on the node where ``pearl-ray serve --detach`` was typed, so that ``--host`` means that node. ``pearl-ray stop``
drains it first; where nobody did, the coordinator's end, whatever its reason, ends the streams with an error and then
the actor.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pearl_ray.actors.handles import OWN_PRIORITY, find_coordinator, namespace_of
from pearl_ray.core.errors import DeploymentNotFoundError, PearlError
from pearl_ray.serving.backend import Model, RayEngine, Tokenizer
from pearl_ray.serving.http_handle import HTTP_SERVER, find_http_actor
from pearl_ray.serving.logs import configure_logging
from pearl_ray.serving.server import HttpServer, bind
from pearl_ray.serving.settings import ServerSettings

LINGER_S = 3.0  # after a failure of the coordinator: time for clients and probes to read why
GONE_TIMEOUT_S = 10.0


class HttpActor:
    """See the module. ``run`` is called once and returns never; the others at any time."""

    def __init__(self, settings: ServerSettings, host: str, port: int) -> None:
        configure_logging(settings.log_format)
        self._server = HttpServer(settings, bind(host, port))
        self._stopped = threading.Event()
        self._coordinator: ActorHandle[Any] | None = None
        self._server.start()

    def attach(self, name: str, tokenizer: Tokenizer) -> str:
        """Answer for this deployment from now on; returns the URL."""
        coordinator = find_coordinator(name)
        if coordinator is None:
            raise DeploymentNotFoundError(f"no deployment {name!r} on this Ray cluster")
        self._coordinator = coordinator
        status = cast("dict[str, Any]", ray.get(coordinator.status.remote()))
        self._server.attach(RayEngine(coordinator), Model(tokenizer, status["max_model_len"]))
        return self._server.url

    def run(self) -> None:
        """Hold the actor until the engine ends, then end it."""
        while not self._server.failed.wait(1.0):
            if self._stopped.is_set():
                break
        else:
            if self._has_failed():
                time.sleep(LINGER_S)
            self._server.stop()
        ray.kill(cast("ActorHandle[Any]", ray.get_runtime_context().current_actor))

    def _has_failed(self) -> bool:
        """Whether the coordinator ended by a failure, which somebody may ask for, and not because it was told to."""
        assert self._coordinator is not None
        try:
            return cast("str", ray.get(self._coordinator.ping.remote())) == "failed"
        except ray.exceptions.RayError:
            return False

    def stop(self, drain_s: float) -> None:
        """Drain for up to ``drain_s`` seconds, then end."""
        self._server.stop(drain_s)
        self._stopped.set()


def start_http_actor(name: str, settings: ServerSettings, host: str, port: int, tokenizer: Tokenizer) -> str:
    """Put a server beside a detached deployment; returns its URL.

    Raises:
        PearlError: the actor could not be started, or the address can't be bound on this node.
    """
    old = find_http_actor(name)
    if old is not None:  # of an earlier deployment of that name, on its way out
        ray.kill(old)
        _await_gone(name)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        cast(Any, ray.remote(HttpActor))
        .options(
            name=HTTP_SERVER,
            namespace=namespace_of(name),
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=here,
            runtime_env=dict(OWN_PRIORITY),
        )
        .remote(settings, host, port)
    )
    try:
        url = cast("str", ray.get(actor.attach.remote(name, tokenizer)))
    except ray.exceptions.RayError as error:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor)
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, PearlError):
            raise error.cause from None
        raise PearlError(
            f"the HTTP server of {name!r} could not start on {host}:{port}: {_last_line(error)}"
        ) from error
    actor.run.remote()
    return url


def _await_gone(name: str) -> None:
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while find_http_actor(name) is not None and time.monotonic() < deadline:
        time.sleep(0.05)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
