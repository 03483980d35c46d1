"""Deployments that run on a Ray cluster: listed, asked, ended. Ray must have been joined (`cluster.ray_session`).

Loads neither torch nor models, so that ``pearl-ray status`` and ``stop`` answer at once. Starting is `deployment`'s.
"""

from __future__ import annotations

import contextlib
import time

import ray
from ray.util.placement_group import PlacementGroup

from pearl_ray.actors.handles import deployment_names, find_coordinator
from pearl_ray.client import Client
from pearl_ray.cluster.placement import remove_placement_group
from pearl_ray.core.errors import DeploymentNotFoundError, PearlError

STOP_TIMEOUT_S = 30.0


def stop_deployment(name: str = "default", *, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End a deployment: the shards finish their round, then everything is removed.

    Raises:
        DeploymentNotFoundError: there is none of that name.
    """
    coordinator = find_coordinator(name)
    group = _placement_group(name)
    if coordinator is None and group is None:
        raise DeploymentNotFoundError(f"no deployment {name!r} on this Ray cluster; running: {_running()}")
    if coordinator is not None:
        with contextlib.suppress(ray.exceptions.RayError):  # it may be dead or hung: it is removed all the same
            ray.get(coordinator.shutdown.remote(), timeout=timeout_s)
        ray.kill(coordinator)
    if group is not None:
        remove_placement_group(group)
    _await_gone(name, timeout_s)


def _await_gone(name: str, timeout_s: float) -> None:
    """Ray takes a killed actor's name away a moment later; the name is free when this returns."""
    deadline = time.monotonic() + timeout_s
    while find_coordinator(name) is not None:
        if time.monotonic() > deadline:
            raise PearlError(f"deployment {name!r} is still there after {timeout_s:g} s")
        time.sleep(0.05)


def _placement_group(name: str) -> PlacementGroup | None:
    """Left behind where a detached coordinator was killed."""
    try:
        return ray.util.get_placement_group(f"pearl-{name}")
    except ValueError:
        return None


def _running() -> str:
    return ", ".join(deployment_names()) or "none"


def deployment_status(name: str = "default") -> dict[str, object]:
    """What a deployment says of itself.

    Raises:
        DeploymentNotFoundError: there is none of that name.
    """
    coordinator = find_coordinator(name)
    if coordinator is None:
        raise DeploymentNotFoundError(f"no deployment {name!r} on this Ray cluster; running: {_running()}")
    return Client(name, coordinator).status()


def list_deployments() -> list[str]:
    """Names of the deployments on this cluster."""
    return deployment_names()
