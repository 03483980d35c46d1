"""``pearl-ray serve``: start a named deployment and hold it. Knows signals and deployments; nothing of actors."""

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

from pearl_ray.commands.console import loading_bars, output_console, progress_console
from pearl_ray.commands.options import ENGINE_OPTIONS, apply, debug_option, option, take_config
from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import EngineDeadError

if TYPE_CHECKING:
    from pearl_ray.client import Client

POLL_SECONDS = 2.0


@click.command()
@option("--name", default="default", help="Name of the deployment; what connect() and --name take.")
@option("--detach", is_flag=True, help="Leave it running on the Ray cluster and return.")
@option(
    "--shutdown-timeout",
    type=click.FloatRange(0.0, min_open=True),
    default=30.0,
    help="Seconds that the shards get to finish their round and end; running requests are aborted.",
)
@apply(ENGINE_OPTIONS)
@debug_option()
def serve(name: str, detach: bool, shutdown_timeout: float, **values: Any) -> None:  # noqa: ANN401 - click's values
    """Place and start draft and target on the running Ray (`ray start --head`), or start Ray too.

    Holds the deployment until SIGINT or SIGTERM, then stops it cleanly; with --detach it stays until `pearl-ray stop`.
    """
    from pearl_ray.cluster.ray_session import open_session
    from pearl_ray.deployment import deploy

    config = take_config(values)
    if detach and config.trace is not None:
        raise click.UsageError("--trace is written when the deployment stops here; leave out --detach.")
    session = open_session(config.ray_address)
    try:
        if detach and session.started:
            raise click.UsageError("--detach needs a Ray that outlives this command; run first: ray start --head")
        with loading_bars(progress_console()) as progress:
            client = deploy(config, name, detached=detach, progress=progress)
        _announce(config, name, detach)
        if not detach:
            _hold(client, config.trace, shutdown_timeout)
    finally:
        session.close()


def _announce(config: PearlConfig, name: str, detach: bool) -> None:
    console = output_console()
    models = f"target {config.target_model or 'embedded'} on {config.target_tensor_parallel_size}"
    if config.uses_draft:
        models += f", draft {config.draft_model or 'embedded'} on {config.draft_tensor_parallel_size}"
    flag = "" if name == "default" else f" --name {name}"
    console.print(f"Deployment {name!r} is up: {config.mode}, {models}.", markup=False)
    console.print(
        f"Talk to it:  pearl-ray chat --name {name}   or in Python  pearl_ray.connect({name!r})", markup=False
    )
    console.print(f"Stop it:     {f'pearl-ray stop{flag}' if detach else 'Ctrl-C'}", markup=False)


def _hold(client: Client, trace: str | None, shutdown_timeout: float) -> None:
    """Wait for a signal, then write the trace and stop the deployment.

    Raises:
        EngineDeadError: the deployment failed by itself.
        DeploymentNotFoundError: it was stopped by somebody else.
    """
    from pearl_ray.deployment import deployment_status, stop_deployment

    with _signals() as arrived:
        while not select.select([arrived], [], [], POLL_SECONDS)[0]:
            status = deployment_status(client.name)
            if status["state"] == "failed":
                raise EngineDeadError(f"deployment {client.name!r} failed: {status['error']}")
        progress_console().print(f"stopping {client.name!r} …", markup=False)
        if trace is not None:
            Path(trace).write_text(json.dumps(client.trace()), "utf-8")
        stop_deployment(client.name, timeout_s=shutdown_timeout)


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
