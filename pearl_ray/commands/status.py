"""``pearl-ray status`` and ``pearl-ray stop``: look at deployments, end one. Start no Ray of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click

from pearl_ray.commands.console import figures, output_console, progress_console
from pearl_ray.commands.options import debug_option, option

_ADDRESS = option("--ray-address", help="host:port of the Ray cluster.  [default: the Ray that runs here]")


@contextmanager
def _joined_ray(address: str | None, name: str | None) -> Iterator[None]:
    """The Ray cluster with that deployment, of those that run here; any, without a name."""
    from pearl_ray.actors.handles import find_coordinator
    from pearl_ray.cluster.ray_session import open_session

    if address == "local":
        raise click.UsageError("--ray-address local would start a new Ray; give the host:port of a running one.")
    wanted = None if name is None else lambda: find_coordinator(name) is not None
    session = open_session(address, start=False, wanted=wanted)
    try:
        yield
    finally:
        session.close()


@click.command()
@option("--name", help="One deployment.  [default: all of this Ray cluster]")
@option("--json", "as_json", is_flag=True, help="Print JSON, one object per deployment and line.")
@_ADDRESS
@debug_option()
def status(name: str | None, as_json: bool, ray_address: str | None) -> None:
    """Show the deployments that run on the Ray cluster."""
    from pearl_ray.running import deployment_status, list_deployments

    console = output_console()
    with _joined_ray(ray_address, name):
        names = [name] if name is not None else list_deployments()
        if not names and not as_json:
            console.print("no deployment is running; start one with: pearl-ray serve")
        for one in names:
            found = deployment_status(one)
            if as_json:
                click.echo(json.dumps(found, default=str))
            else:
                console.print(figures(one, rows(found)))


def rows(found: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Figures as rows; what is nested gets the outer name before its own."""
    table: list[tuple[str, str]] = []
    for key, value in found.items():
        name = f"{prefix}{key}"
        if key == "graphs" and isinstance(value, Mapping):
            table += [(f"{role} CUDA graphs", _graphs(figures)) for role, figures in value.items()]
        elif isinstance(value, Mapping):
            table += rows(value, f"{name}.")
        elif key == "shards" and isinstance(value, list):
            table += [(f"{s['role']} shard {s['rank']}", f"{s['device']}, pid {s['pid']} on {s['ip']}") for s in value]
        elif value is not None:
            table.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return table


def _graphs(f: Mapping[str, float]) -> str:
    """What one model's CUDA graphs have cost."""
    left_out = f", {f['num_skipped']} left out by the budget" if f["num_skipped"] else ""
    return f"{f['num_captured']} in {f['seconds']:.1f} s and {f['bytes'] / 2**30:.2f} GiB{left_out}"


@click.command()
@option("--name", default="default", help="The deployment to stop.")
@option(
    "--shutdown-timeout",
    type=click.FloatRange(0.0, min_open=True),
    default=30.0,
    help="Seconds that running requests of a detached server get to end, and then the shards.",
)
@_ADDRESS
@debug_option()
def stop(name: str, shutdown_timeout: float, ray_address: str | None) -> None:
    """Stop a deployment: take no new requests, let those that run end, then the actors; give back what they held."""
    from pearl_ray.running import stop_deployment
    from pearl_ray.serving.http_handle import drain_http_actor, find_http_actor

    with _joined_ray(ray_address, name):
        server = find_http_actor(name)
        if server is not None:
            remark = f"running requests have {shutdown_timeout:g} s to end …"
            progress_console().print(remark, markup=False)
            drain_http_actor(server, shutdown_timeout)
        stop_deployment(name, timeout_s=shutdown_timeout)
    output_console().print(f"stopped {name!r}", markup=False)
