"""Bringing a deployment up: place the shards, let them meet, load, measure, allocate, connect. Talks to Ray actors.

Everything that can be refused is refused here, before a request is taken. Called once, by the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import ray
import torch
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pearl_ray.actors.bridging import open_bridge, take_bridge
from pearl_ray.actors.draft_shard import DraftShard
from pearl_ray.actors.handles import OWN_PRIORITY
from pearl_ray.actors.spec import (
    BridgeWiring,
    DeploymentSpec,
    GroupWiring,
    MailboxWiring,
    Profile,
    Role,
    ShardInfo,
    Wiring,
)
from pearl_ray.actors.target_shard import TargetShard
from pearl_ray.cluster.bridge_choice import TYPICAL_WINDOW, candidates, fastest, frame_sizes
from pearl_ray.cluster.devices import DeviceKey, Transport, choose_transport
from pearl_ray.cluster.placement import Bundle
from pearl_ray.cluster.shm import arena_path
from pearl_ray.core.costs import StepCosts
from pearl_ray.core.errors import OutOfMemoryError
from pearl_ray.model.graphs import GraphFigures
from pearl_ray.model.loading import Models
from pearl_ray.model.memory import Measured, Place, num_cache_blocks, tensor_parallel_size_for

DEFAULT_MAX_MODEL_LEN = 8192  # on CPU, where a model's own limit can be far more than memory and patience allow
CPU_CACHE_SHARE = 0.25  # of the free memory, for both caches together
CPU_CACHE_LIMIT = 4 << 30

ShardId = tuple[Role, int]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BridgeChoice:
    """What carries the bridge, and the seconds of a typical round trip per transport that was measured."""

    transport: Transport
    round_trips_s: dict[Transport, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment that is up: its shards, the sizes that were decided, what was measured.

    Attributes:
        graphs: what CUDA graphs have cost, per model the most of any rank; empty on CPUs.
    """

    shards: dict[ShardId, ActorHandle]
    infos: dict[ShardId, ShardInfo]
    num_blocks: int
    max_model_len: int
    costs: StepCosts | None
    endpoints: dict[ShardId, str]
    bridge: BridgeChoice | None = None
    graphs: dict[Role, GraphFigures] = field(default_factory=dict)


def place(spec: DeploymentSpec, group: PlacementGroup, bundles: Sequence[Bundle]) -> dict[ShardId, ActorHandle]:
    """Create the shard actors, each in its bundle; they are owned by, and die with, the calling actor."""
    shards: dict[ShardId, ActorHandle] = {}
    for index, bundle in enumerate(bundles):
        if bundle.role == "coordinator":
            continue
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        cls = DraftShard if bundle.role == "draft" else TargetShard
        resources = bundle.resources
        shards[bundle.role, bundle.rank] = cls.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=strategy,
            runtime_env=dict(OWN_PRIORITY),
        ).remote(spec, bundle.rank)
    return shards


class BringUp:
    """The steps from placed shards to a deployment; ``phase`` says which one is running, for progress bars."""

    def __init__(self, spec: DeploymentSpec, shards: dict[ShardId, ActorHandle]) -> None:
        self._spec = spec
        self._shards = shards
        self._infos: dict[ShardId, ShardInfo] = {}
        self._arenas: list[str] = []
        self.phase = "placing"

    def discard(self) -> None:
        """After a failure: take away the shared memory that not all shards had attached to."""
        for path in self._arenas:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    async def run(self, models: Models, folder: str, open_inbox: Callable[[str | None, str], str]) -> Deployment:
        """All steps.

        Args:
            folder: a private one for the sockets of this host.
            open_inbox: opens the coordinator's inbox in that folder, or (None) on TCP at an address; its endpoint.
        """
        self._infos = await self._all(lambda shard, _: shard.info.remote())
        max_model_len = _max_model_len(self._spec, models)
        _check_memory(self._spec, models, self._infos)
        bridge = await self._bridge()
        self.phase = "loading"
        groups = await self._groups()
        await self._all(lambda shard, key: shard.load.remote(groups[key[0]]))
        self.phase = "measuring"
        measured = await self._measure_memory(models, max_model_len)
        num_blocks = _num_blocks(self._spec, self._infos, measured, max_model_len)
        await self._all(lambda shard, key: shard.allocate.remote(num_blocks, models.num_valid[key[0]], max_model_len))
        costs = await self._measure(num_blocks)
        graphs = await self._graphs()
        self.phase = "connecting"
        endpoints = await self._connect(open_inbox, folder)
        self.phase = "ready"
        return Deployment(self._shards, self._infos, num_blocks, max_model_len, costs, endpoints, bridge, graphs)

    async def progress(self) -> tuple[int, int]:
        """Layers loaded and in all, summed over the shards."""
        counts = await asyncio.gather(*(shard.progress.remote() for shard in self._shards.values()))
        return sum(c[0] for c in counts), sum(c[1] for c in counts)

    async def _all(self, call: Callable[[ActorHandle, ShardId], Awaitable[object]]) -> dict[ShardId, object]:
        """Call every shard at once; the first error ends the bring-up."""
        results = await asyncio.gather(*(call(shard, key) for key, shard in self._shards.items()))
        return dict(zip(self._shards, results, strict=True))

    async def _groups(self) -> dict[Role, GroupWiring]:
        """Where each model's ranks meet."""
        groups: dict[Role, GroupWiring] = {}
        for role in self._spec.roles:
            ranks = [(role, rank) for rank in range(self._spec.tp(role))]
            transport = choose_transport([self._infos[key].key for key in ranks])
            groups[role] = GroupWiring(
                transport=transport, meeting_point=await self._meeting_point(ranks[0], transport, f"{role}-group")
            )
        return groups

    async def _meeting_point(self, host: ShardId, transport: Transport, label: str) -> str:
        if transport == "single":
            return ""
        if transport == "shm":
            self._arenas.append(arena_path(label))
            return self._arenas[-1]
        return f"{await self._shards[host].open_store.remote()}/{label}"

    async def _measure_memory(self, models: Models, max_model_len: int) -> dict[ShardId, Measured]:
        """One model after the other: where they share a GPU, neither disturbs the other's measurements."""
        measured: dict[ShardId, Measured] = {}
        for role in self._spec.roles:
            ranks = {key: shard for key, shard in self._shards.items() if key[0] == role}
            await asyncio.gather(*(shard.settle.remote() for shard in ranks.values()))
            calls = (shard.measure.remote(models.num_valid[role], max_model_len) for shard in ranks.values())
            measured |= dict(zip(ranks, await asyncio.gather(*calls), strict=True))
        return measured

    async def _measure(self, num_blocks: int) -> StepCosts | None:
        """The costs that an automatic window needs: first the target's, then the draft's, neither disturbed."""
        if "draft" not in self._spec.roles or self._spec.num_speculative_tokens is not None:
            return None
        seconds: dict[Role, dict[int, float]] = {}
        for role in self._spec.roles:
            ranks = [shard for (r, _), shard in self._shards.items() if r == role]
            profiles: list[Profile] = await asyncio.gather(*(shard.profile.remote(num_blocks) for shard in ranks))
            seconds[role] = {size: max(p.seconds[size] for p in profiles) for size in profiles[0].seconds}
        return StepCosts(seconds["target"], seconds["draft"])

    async def _graphs(self) -> dict[Role, GraphFigures]:
        """What CUDA graphs have cost, once all are made."""
        found = await self._all(lambda shard, _: shard.graphs.remote())
        of_role: dict[Role, list[GraphFigures]] = {role: [] for role in self._spec.roles}
        for (role, _), figures in found.items():
            if isinstance(figures, GraphFigures):
                of_role[role].append(figures)
        return {role: GraphFigures.most(figures) for role, figures in of_role.items() if figures}

    async def _connect(self, open_inbox: Callable[[str | None, str], str], folder: str) -> dict[ShardId, str]:
        keys = list(self._shards)
        own_node = ray.get_runtime_context().get_node_id()
        same_host = {info.key.node for info in self._infos.values()} == {own_node}
        shared = folder if same_host else None
        coordinator = open_inbox(shared, ray.util.get_node_ip_address())
        endpoints = await self._all(lambda shard, _: shard.open_inbox.remote(shared))
        leader: ShardId = ("target", 0)
        followers = tuple(str(endpoints[key]) for key in keys if key != leader)
        await self._all(
            lambda shard, key: shard.connect.remote(
                Wiring(coordinator=coordinator, followers=followers if key == leader else ())
            )
        )
        return {key: str(endpoint) for key, endpoint in endpoints.items()}

    async def _bridge(self) -> BridgeChoice | None:
        """Open the bridge over what was asked for, or over all that is possible, and keep the fastest.

        Before the weights are read: what can't be had is refused early, the devices are idle, and what NCCL takes of
        their memory is taken before the caches are sized.
        """
        spec = self._spec
        if "draft" not in spec.roles:
            return None
        keys = [info.key for info in self._infos.values()]
        possible = candidates(spec.bridge, keys, has_nccl=torch.distributed.is_nccl_available())
        trial = len(possible) > 1
        opened: dict[Transport, float] = {}
        for transport in possible:
            wiring = await self._bridge_wiring(transport, trial)
            calls = {key: shard.__ray_call__.remote(open_bridge, wiring) for key, shard in self._shards.items()}
            results = dict(zip(calls, await asyncio.gather(*calls.values(), return_exceptions=True), strict=True))
            error = next((r for r in results.values() if isinstance(r, BaseException)), None)
            if error is None:
                opened[transport] = results["draft", 0] or 0.0
                continue
            others = trial and (opened or transport != possible[-1])
            if not others or not isinstance(error, (TimeoutError, ConnectionError, RuntimeError)):
                raise error
            logger.warning("the bridge can't go over %s here: %s", transport, str(error).splitlines()[-1])
            self.discard()  # only the bridge's arenas are there yet, and those of a success have no name any more
        taken = fastest(opened)
        await self._all(lambda shard, _: shard.__ray_call__.remote(take_bridge, taken))
        choice = BridgeChoice(taken, opened if trial else {})
        figures = ", ".join(f"{name} {1e6 * s:.0f} µs" for name, s in choice.round_trips_s.items())
        why = f"round trips: {figures}" if trial else "asked for" if spec.bridge != "auto" else "no other is needed"
        logger.info("the bridge goes over %s (%s)", taken, why)
        return choice

    async def _bridge_wiring(self, transport: Transport, trial: bool) -> BridgeWiring:
        spec = self._spec
        frames = frame_sizes(spec.max_num_seqs, spec.num_speculative_tokens or TYPICAL_WINDOW)
        sides: tuple[tuple[ShardId, int, str], ...] = (
            (("draft", 0), spec.target_tp, f"windows-{transport}"),
            (("target", 0), spec.draft_tp, f"verdicts-{transport}"),
        )
        mailboxes = [
            MailboxWiring(
                transport=transport,
                meeting_point=await self._meeting_point(writer, transport, label),
                num_readers=num_readers,
                frame_bytes=frame_bytes,
            )
            for (writer, num_readers, label), frame_bytes in zip(sides, frames, strict=True)
        ]
        return BridgeWiring(windows=mailboxes[0], verdicts=mailboxes[1], trial=trial)


def _max_model_len(spec: DeploymentSpec, models: Models) -> int:
    """The longest sequence: what was asked for, or what both models can hold."""
    if spec.max_model_len is not None:
        return spec.max_model_len
    return min(models.max_model_len, DEFAULT_MAX_MODEL_LEN) if spec.device == "cpu" else models.max_model_len


def _check_memory(spec: DeploymentSpec, models: Models, infos: dict[ShardId, ShardInfo]) -> None:
    """Refuse weights that can't fit, before they are read: per node on CPUs, per GPU else."""
    for keys in _by_place(infos):
        needed = sum(models.weight_bytes(role, spec.dtype) / spec.tp(role) for role, _ in keys)
        free = min(infos[key].free_bytes for key in keys)
        if needed > free:
            info, ways = infos[keys[0]], ["use a smaller model or dtype"]
            if info.device == "cuda":
                many = len(keys) > 1
                ways.insert(0, "raise --gpu-memory-utilization" if many else _more_shards(spec, models, keys, free))
            raise OutOfMemoryError(
                f"the weights need {needed / 2**30:.1f} GiB as {spec.dtype} and the {info.device} of node {info.ip} "
                f"has {free / 2**30:.1f} GiB free; {', or '.join(ways)}, or more shards on more devices"
            )


def _more_shards(spec: DeploymentSpec, models: Models, keys: list[ShardId], free: int) -> str:
    """The tensor-parallel size with which a model's weights alone would fit."""
    role = keys[0][0]
    fits = tensor_parallel_size_for(models.weight_bytes(role, spec.dtype), free, models.configs[role].num_heads)
    return f"raise --{role}-tp" + ("" if fits is None else f" to {fits}")


def _by_place(infos: dict[ShardId, ShardInfo]) -> list[list[ShardId]]:
    """The shards that share memory: those on one GPU, or on the CPUs of one node."""
    places: dict[DeviceKey, list[ShardId]] = {}
    for key, info in infos.items():
        places.setdefault(info.key, []).append(key)
    return list(places.values())


def _num_blocks(
    spec: DeploymentSpec, infos: dict[ShardId, ShardInfo], measured: dict[ShardId, Measured], max_model_len: int
) -> int:
    """Blocks per model: what is asked for, or what fits, but no more than the batch can ever use."""
    if spec.kv_cache_blocks is not None:
        return spec.kv_cache_blocks
    places = []
    for keys in _by_place(infos):
        here = [measured[key] for key in keys]
        total, on_cpu = min(m.total_bytes for m in here), infos[keys[0]].device == "cpu"
        places.append(
            Place(
                name=f"the {infos[keys[0]].device} of node {infos[keys[0]].ip}",
                total_bytes=min(int(CPU_CACHE_SHARE * total), CPU_CACHE_LIMIT) if on_cpu else total,
                used_bytes=max(m.used_bytes for m in here),
                utilization=None if on_cpu else spec.gpu_memory_utilization,
                shards=tuple(m.shard for m in here),
            )
        )
    return num_cache_blocks(
        places, block_size=spec.block_size, max_model_len=max_model_len, max_num_seqs=spec.max_num_seqs
    )
