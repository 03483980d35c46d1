"""Bringing a deployment up: place the shards, let them meet, load, measure, allocate, connect. Talks to Ray actors.

Everything that can be refused is refused here, before a request is taken. Called once, by the coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pearl_ray.actors.draft_shard import DraftShard
from pearl_ray.actors.spec import (
    DeploymentSpec,
    GroupWiring,
    MailboxWiring,
    Profile,
    Role,
    ShardFootprint,
    ShardInfo,
    Wiring,
)
from pearl_ray.actors.target_shard import TargetShard
from pearl_ray.cluster.devices import DeviceKey, Transport, choose_transport
from pearl_ray.cluster.placement import Bundle
from pearl_ray.cluster.shm import arena_path
from pearl_ray.core.errors import OutOfMemoryError
from pearl_ray.core.windows import StepCosts
from pearl_ray.model.loading import Models

DEFAULT_MAX_MODEL_LEN = 8192  # on CPU, where a model's own limit can be far more than memory and patience allow
CPU_CACHE_SHARE = 0.25  # of the free memory, for both caches together
CPU_CACHE_LIMIT = 4 << 30

ShardId = tuple[Role, int]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment that is up: its shards, the sizes that were decided, what was measured."""

    shards: dict[ShardId, ActorHandle]
    infos: dict[ShardId, ShardInfo]
    num_blocks: int
    max_model_len: int
    costs: StepCosts | None
    endpoints: dict[ShardId, str]


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
            num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), scheduling_strategy=strategy
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
        self.phase = "loading"
        groups = await self._groups()
        footprints: dict[ShardId, ShardFootprint] = await self._all(
            lambda shard, key: shard.load.remote(groups[key[0]])
        )
        num_blocks = _num_blocks(self._spec, self._infos, footprints, max_model_len)
        self.phase = "measuring"
        await self._all(lambda shard, key: shard.allocate.remote(num_blocks, models.num_valid[key[0]]))
        costs = await self._measure(num_blocks)
        self.phase = "connecting"
        endpoints = await self._connect(open_inbox, folder)
        self.phase = "ready"
        return Deployment(self._shards, self._infos, num_blocks, max_model_len, costs, endpoints)

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

    async def _connect(self, open_inbox: Callable[[str | None, str], str], folder: str) -> dict[ShardId, str]:
        spec, keys = self._spec, list(self._shards)
        own_node = ray.get_runtime_context().get_node_id()
        same_host = {info.key.node for info in self._infos.values()} == {own_node}
        shared = folder if same_host else None
        coordinator = open_inbox(shared, ray.util.get_node_ip_address())
        endpoints = await self._all(lambda shard, _: shard.open_inbox.remote(shared))
        leader: ShardId = ("target", 0)
        followers = tuple(str(endpoints[key]) for key in keys if key != leader)
        windows = verdicts = None
        if "draft" in spec.roles:
            windows = await self._mailbox(("draft", 0), spec.target_tp, same_host, "windows")
            verdicts = await self._mailbox(leader, spec.draft_tp, same_host, "verdicts")
        await self._all(
            lambda shard, key: shard.connect.remote(
                Wiring(
                    coordinator=coordinator,
                    followers=followers if key == leader else (),
                    windows=windows,
                    verdicts=verdicts,
                )
            )
        )
        return {key: str(endpoint) for key, endpoint in endpoints.items()}

    async def _mailbox(self, writer: ShardId, num_readers: int, same_host: bool, label: str) -> MailboxWiring:
        transport: Transport = "shm" if same_host else "gloo"
        point = await self._meeting_point(writer, transport, label)
        return MailboxWiring(transport=transport, meeting_point=point, num_readers=num_readers)


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
            where = f"the {infos[keys[0]].device} of node {infos[keys[0]].ip}"
            raise OutOfMemoryError(
                f"the weights need {needed / 2**30:.1f} GiB as {spec.dtype} and {where} has {free / 2**30:.1f} GiB "
                "free; use a smaller model or dtype, or more shards on more devices"
            )


def _by_place(infos: dict[ShardId, ShardInfo]) -> list[list[ShardId]]:
    """The shards that share memory: those on one GPU, or on the CPUs of one node."""
    places: dict[DeviceKey, list[ShardId]] = {}
    for key, info in infos.items():
        places.setdefault(info.key, []).append(key)
    return list(places.values())


def _num_blocks(
    spec: DeploymentSpec,
    infos: dict[ShardId, ShardInfo],
    footprints: dict[ShardId, ShardFootprint],
    max_model_len: int,
) -> int:
    """Blocks per model: what is asked for, or what fits, but no more than the batch can ever use."""
    if spec.kv_cache_blocks is not None:
        return spec.kv_cache_blocks
    least = -(-max_model_len // spec.block_size)
    fits = least * spec.max_num_seqs
    for keys in _by_place(infos):
        free = min(footprints[key].free_bytes for key in keys)
        budget = min(int(CPU_CACHE_SHARE * free), CPU_CACHE_LIMIT) if infos[keys[0]].device == "cpu" else free
        per_block = sum(footprints[key].bytes_per_block for key in keys)
        fits = min(fits, max(budget, 0) // per_block)
        if fits < least:
            raise OutOfMemoryError(
                f"a KV cache for max_model_len={max_model_len} needs {least * per_block / 2**20:.0f} MiB on "
                f"{infos[keys[0]].device} of node {infos[keys[0]].ip} and {max(budget, 0) / 2**20:.0f} MiB are there "
                f"for it; lower max_model_len to {fits * spec.block_size} or less"
            )
    return fits
