"""Devices: which kind a deployment runs on, which one a shard was given, and what its peers can talk over.

Knows torch devices and resource dictionaries. Never imports Ray: nodes come in as plain mappings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pearl_ray.core.errors import ConfigError

Device = Literal["cuda", "cpu"]
Transport = Literal["single", "shm", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """Where a shard is: the Ray node's id, and the GPU's UUID (None: it computes on the CPU)."""

    node: str
    gpu: str | None


def choose_device(requested: str, node_resources: Mapping[str, Mapping[str, float]]) -> Device:
    """``auto`` is cuda where the cluster has a GPU, else cpu.

    Args:
        requested: "auto", "cuda" or "cpu".
        node_resources: node id to the resources it has in all, by Ray's names ("CPU", "GPU").

    Raises:
        ConfigError: another word, or cuda on a cluster without a GPU.
    """
    num_gpus = sum(resources.get("GPU", 0.0) for resources in node_resources.values())
    if requested == "auto":
        return "cuda" if num_gpus > 0 else "cpu"
    if requested == "cpu":
        return "cpu"
    if requested != "cuda":
        raise ConfigError("device", requested, "one of auto, cuda, cpu")
    if num_gpus <= 0:
        raise ConfigError("device", requested, "the Ray cluster has no GPU; use --device cpu, or add a node with one")
    return "cuda"


def open_device(device: Device) -> torch.device:
    """The device that the calling shard computes on, made current.

    Ray shows a shard only the GPU of its bundle (CUDA_VISIBLE_DEVICES), so it is number 0. A CPU shard runs one thread:
    there are as many shards as cores, or more.
    """
    if device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def device_key(node: str, device: torch.device) -> DeviceKey:
    """Who ``device`` is, across processes."""
    if device.type == "cpu":
        return DeviceKey(node, None)
    return DeviceKey(node, str(torch.cuda.get_device_properties(device).uuid))


def choose_transport(keys: Sequence[DeviceKey]) -> Transport:
    """What the ranks of one group talk over.

    NCCL needs a GPU per rank: two ranks on one device, which it refuses, take shared memory (one host) or gloo.
    """
    if len(keys) == 1:
        return "single"
    gpus = [key.gpu for key in keys]
    if None not in gpus and len(set(gpus)) == len(gpus):
        return "nccl"
    return "shm" if len({key.node for key in keys}) == 1 else "gloo"


def num_usable_cores() -> int:
    """Cores this process may run on (affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0))
