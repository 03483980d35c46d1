"""Where a deployment is found on a Ray cluster: names, namespaces, handles."""

from __future__ import annotations

import ray
from ray.actor import ActorHandle

COORDINATOR = "pearl-coordinator"
PREFIX = "pearl-"


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
