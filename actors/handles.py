"""What a deployment's actors are called on a Ray cluster, how they are found, and the priority that they run at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

COORDINATOR = "pearl-coordinator"
PREFIX = "pearl-"
# Of every actor here: Ray gives its workers the least of the CPU (nice 15), behind whatever else runs on the host. What
# serves tokens isn't background work: one starved shard holds up the round of all.
OWN_PRIORITY: Mapping[str, Any] = {"env_vars": {"RAY_worker_niceness": "0"}}


def namespace_of(name: str) -> str:
    """The Ray namespace of a deployment."""
    return f"{PREFIX}{name}"


def find_coordinator(name: str) -> ActorHandle | None:
    """The coordinator of a deployment, or None."""
    try:
        return ray.get_actor(COORDINATOR, namespace=namespace_of(name))
    except ValueError:
        return None


def deployment_names() -> list[str]:
    """All deployments whose coordinator is alive."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["namespace"].removeprefix(PREFIX)
        for actor in actors
        if actor["name"] == COORDINATOR and actor["namespace"].startswith(PREFIX)
    )
