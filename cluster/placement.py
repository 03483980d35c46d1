"""Placement: one bundle per process of a deployment, and the check that the cluster has room for all of them.

The plan and the check are pure; the functions below the line talk to Ray, without its dashboard. Knows nothing of what
runs in a bundle.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pearl_ray.core.errors import PlacementError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from pearl_ray.cluster.devices import Device

Role = Literal["coordinator", "draft", "target"]
Resources = Mapping[str, float]

CPUS_PER_SHARD = 0.1  # on CPU machines: a draft, seven target shards and the coordinator take 0.9 of a 2-core machine
_EPSILON = 1e-6  # Ray counts in steps of 1e-4


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one process asks of Ray: its role, its rank among that role's, and resources by Ray's names."""

    role: Role
    rank: int
    resources: Resources

    def __str__(self) -> str:
        return f"{self.role} {self.rank} ({_listed(self.resources)})"


def plan_bundles(
    device: Device,
    draft_tp: int,
    target_tp: int,
    *,
    cpus_per_shard: float = CPUS_PER_SHARD,
    gpu_fraction: float = 1.0,
) -> list[Bundle]:
    """Bundle 0 the coordinator's, then the draft shards' by rank, then the target shards'.

    Args:
        device: "cuda": a GPU and a CPU per shard; "cpu": ``cpus_per_shard`` each.
        draft_tp: draft shards; 0 without a draft (mode ar).
        target_tp: target shards, at least 1.
        cpus_per_shard: on CPU machines, for the coordinator too; a share for Ray's accounting, not a limit.
        gpu_fraction: below 1, several shards share a GPU (draft and target on one card); each then asks for that share
            of a CPU as well.
    """
    assert draft_tp >= 0 and target_tp >= 1 and cpus_per_shard > 0 and 0 < gpu_fraction <= 1
    if device == "cuda":
        shard = {"GPU": gpu_fraction, "CPU": gpu_fraction}
        coordinator = {"CPU": 1.0 if gpu_fraction == 1 else gpu_fraction}
    else:
        shard = coordinator = {"CPU": cpus_per_shard}
    return [
        Bundle("coordinator", 0, coordinator),
        *(Bundle("draft", rank, shard) for rank in range(draft_tp)),
        *(Bundle("target", rank, shard) for rank in range(target_tp)),
    ]


def unplaceable(bundles: Sequence[Bundle], nodes_available: Mapping[str, Resources]) -> list[Bundle]:
    """The bundles that find no node, first fit, those with the most GPUs and CPUs placed first; in the plan's order."""
    free = {node: dict(resources) for node, resources in nodes_available.items()}
    order = sorted(bundles, key=lambda b: (-b.resources.get("GPU", 0.0), -b.resources.get("CPU", 0.0)))
    left_over: list[Bundle] = []
    for bundle in order:
        node = next((n for n, have in free.items() if _fits(bundle.resources, have)), None)
        if node is None:
            left_over.append(bundle)
            continue
        for name, amount in bundle.resources.items():
            free[node][name] -= amount
    return [bundle for bundle in bundles if bundle in left_over]


def describe_shortage(bundles: Sequence[Bundle], missing: Sequence[Bundle], nodes: Mapping[str, Resources]) -> str:
    """One line: what can't be placed, what is free where, and the remedy."""
    free = "; ".join(f"node {node[:8]}: {_listed(have)}" for node, have in nodes.items()) or "no node is alive"
    return (
        f"no room for {', '.join(map(str, missing))} (of {len(bundles)} bundles); free are {free}. "
        "Lower --target-tp or --draft-tp, stop other Ray jobs, or add nodes"
    )


def _fits(wanted: Resources, have: Resources) -> bool:
    return all(have.get(name, 0.0) + _EPSILON >= amount for name, amount in wanted.items())


def _listed(resources: Resources) -> str:
    return " ".join(f"{name} {resources.get(name, 0.0):g}" for name in ("GPU", "CPU") if resources.get(name)) or "none"


# ---- from here on: Ray


def total_resources() -> dict[str, dict[str, float]]:
    """Node id to all the resources it has, for the nodes that are alive."""
    ray: Any = importlib.import_module("ray")
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def available_resources() -> dict[str, dict[str, float]]:
    """Node id to the resources nobody has taken, for the nodes that are alive."""
    ray: Any = importlib.import_module("ray")
    state: Any = importlib.import_module("ray._private.state")  # the public call for this needs the dashboard
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {node: dict(have) for node, have in state.available_resources_per_node().items() if node in alive}


def create_placement_group(
    bundles: Sequence[Bundle], name: str, *, detached: bool = False, grace_s: float = 3.0, timeout_s: float = 60.0
) -> PlacementGroup:
    """Reserve all of ``bundles``, or nothing; the group's bundle indices are those of the list.

    Args:
        bundles: from :func:`plan_bundles`.
        name: of the group; Ray refuses one that exists.
        detached: the group outlives this process, until :func:`remove_placement_group`.
        grace_s: how long to wait for what others hold: Ray hears of freed resources late. What the cluster doesn't have
            at all is refused at once.
        timeout_s: how long Ray may take to reserve.

    Raises:
        PlacementError: names the bundles that can't be placed, and what is free.
    """
    from ray.util.placement_group import placement_group

    totals = total_resources()
    if missing := unplaceable(bundles, totals):
        raise PlacementError(describe_shortage(bundles, missing, available_resources()))
    deadline = time.monotonic() + grace_s
    while missing := unplaceable(bundles, available := available_resources()):
        if time.monotonic() > deadline:
            raise PlacementError(describe_shortage(bundles, missing, available))
        time.sleep(0.1)
    group: PlacementGroup = placement_group(
        [dict(bundle.resources) for bundle in bundles],
        strategy="PACK",
        name=name,
        lifetime="detached" if detached else None,
    )
    if not group.wait(timeout_s):
        available = available_resources()
        remove_placement_group(group)
        missing = unplaceable(bundles, available) or list(bundles)
        raise PlacementError(describe_shortage(bundles, missing, available))
    return group


def remove_placement_group(group: PlacementGroup, timeout_s: float = 10.0) -> None:
    """Give the reservation back, ending what runs in it, and wait until Ray says that it is gone."""
    import ray.util

    ray.util.remove_placement_group(group)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ray.util.placement_group_table(group).get("state") in (None, "REMOVED"):
            return
        time.sleep(0.02)


def nodes_of(group: PlacementGroup) -> list[str]:
    """The node id of each bundle, in the plan's order."""
    import ray.util

    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return [nodes[index] for index in sorted(nodes, key=int)]
