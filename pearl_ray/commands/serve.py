"""``pearl-ray serve``: start a named deployment and its HTTP server, and hold both. Knows signals, no actors."""

from __future__ import annotations

import json
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pearl_ray.commands import http
from pearl_ray.commands.console import loading_bars, output_console, progress_console
from pearl_ray.commands.options import ENGINE_OPTIONS, apply, debug_option, option, take_config
from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import EngineDeadError

if TYPE_CHECKING:
    from pearl_ray.client import Client
    from pearl_ray.serving.server import HttpServer
    from pearl_ray.serving.settings import ServerSettings

POLL_SECONDS = 2.0
START_TIMEOUT_S = 30.0


@click.command()
@option("--name", default="default", help="Name of the deployment; what connect() and --name take.")
@option("--detach", is_flag=True, help="Leave it running on the Ray cluster and return.")
@option(
    "--shutdown-timeout",
    type=click.FloatRange(0.0, min_open=True),
    default=30.0,
    help="Seconds after SIGTERM that running requests get to end, and then the shards; a second signal ends the wait.",
)
@apply(http.HTTP_OPTIONS)
@apply(ENGINE_OPTIONS)
@debug_option()
def serve(name: str, detach: bool, shutdown_timeout: float, host: str, port: int, **values: Any) -> None:  # noqa: ANN401
    """Place and start draft and target on the running Ray (`ray start --head`), or start Ray too; serve OpenAI's API.

    Holds the deployment until SIGINT or SIGTERM, then stops it cleanly; with --detach it stays until `pearl-ray stop`.
    """
    from pearl_ray.cluster.ray_session import open_session

    config = take_config(values)
    http.require_packages()
    settings = http.take_settings(values, config)
    if detach and config.trace is not None:
        raise click.UsageError("--trace is written when the deployment stops here; leave out --detach.")
    for warning in http.warnings_of(settings, host):
        progress_console().print(f"Warning: {warning}", markup=False)
    with http.bind_or_refuse(host, port) as listener:  # before anything is loaded
        session = open_session(config.ray_address)
        try:
            if not detach:
                _serve_here(config, name, settings, listener, shutdown_timeout)
                return
            if session.started:
                raise click.UsageError("--detach needs a Ray that outlives this command; run first: ray start --head")
            listener.close()  # the actor will bind it
            _serve_detached(config, name, settings, host, port)
        finally:
            session.close()


def _serve_here(
    config: PearlConfig, name: str, settings: ServerSettings, listener: socket.socket, shutdown_timeout: float
) -> None:
    """The HTTP server in this process, from the start: it says it isn't ready while the models load."""
    from pearl_ray.deployment import deploy
    from pearl_ray.serving.logs import configure_logging
    from pearl_ray.serving.server import HttpServer

    configure_logging(settings.log_format)
    with HttpServer(settings, listener) as server:
        with loading_bars(progress_console()) as bars:

            def progress(phase: str, done: int, total: int) -> None:
                bars(phase, done, total)
                server.report(phase, done, total)

            client = deploy(config, name, detached=False, progress=progress)
            http.attach(server, client, config)
        _announce(config, name, server.url, detach=False)
        _hold(client, server, config.trace, shutdown_timeout)


def _serve_detached(config: PearlConfig, name: str, settings: ServerSettings, host: str, port: int) -> None:
    """The HTTP server in an actor beside the coordinator."""
    from pearl_ray.deployment import deploy
    from pearl_ray.running import stop_deployment
    from pearl_ray.serving.http_actor import start_http_actor

    with loading_bars(progress_console()) as progress:
        deploy(config, name, detached=True, progress=progress)
        try:
            url = start_http_actor(name, settings, host, port, http.target_tokenizer(config))
        except BaseException:
            stop_deployment(name, timeout_s=START_TIMEOUT_S)
            raise
    _announce(config, name, url, detach=True)


def _announce(config: PearlConfig, name: str, url: str, *, detach: bool) -> None:
    console = output_console()
    models = f"target {config.target_model or 'embedded'} on {config.target_tensor_parallel_size}"
    if config.uses_draft:
        models += f", draft {config.draft_model or 'embedded'} on {config.draft_tensor_parallel_size}"
    flag = "" if name == "default" else f" --name {name}"
    console.print(f"Deployment {name!r} is up: {config.mode}, {models}.", markup=False)
    console.print(f"Web page:    {url}/   OpenAI API  {url}/v1", markup=False)
    console.print(
        f"Talk to it:  pearl-ray chat --name {name}   or in Python  pearl_ray.connect({name!r})", markup=False
    )
    console.print(f"Stop it:     {f'pearl-ray stop{flag}' if detach else 'Ctrl-C'}", markup=False)


def _hold(client: Client, server: HttpServer, trace: str | None, shutdown_timeout: float) -> None:
    """Wait for a signal, then drain the server, write the trace and stop the deployment.

    Raises:
        EngineDeadError: the deployment failed by itself.
        DeploymentNotFoundError: it was stopped by somebody else.
    """
    from pearl_ray.running import deployment_status, stop_deployment

    with _signals() as arrived:
        while not select.select([arrived], [], [], POLL_SECONDS)[0]:
            status = deployment_status(client.name)
            if status["state"] == "failed":
                raise EngineDeadError(f"deployment {client.name!r} failed: {status['error']}")
        progress_console().print(f"stopping {client.name!r} …", markup=False)
        _drain(server, arrived, shutdown_timeout)
        if trace is not None:
            Path(trace).write_text(json.dumps(client.trace()), "utf-8")
        stop_deployment(client.name, timeout_s=shutdown_timeout)


def _drain(server: HttpServer, arrived: socket.socket, shutdown_timeout: float) -> None:
    """Let running requests end; a further signal ends the wait for them."""
    arrived.recv(64)
    drained = server.begin_stop(shutdown_timeout)
    while not drained.done():
        if select.select([arrived], [], [], 0.05)[0]:
            arrived.recv(64)
            server.hurry()
    server.join()


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that becomes readable at SIGINT or SIGTERM, whichever thread the signal interrupts."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = (signal.SIGINT, signal.SIGTERM)
    with reader, writer:
        wakeup = signal.set_wakeup_fd(writer.fileno())
        handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield reader
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
