"""Where processes find each other: groups and mailboxes by a transport's name and a meeting point. Knows no Ray.

A meeting point is a path in shared memory, chosen by anybody beforehand, or the ``host:port/name`` of a store that one
of the parties serves.
"""

from __future__ import annotations

import torch
from torch.distributed import Store

from pearl_ray.cluster.devices import Transport
from pearl_ray.cluster.framed_mailbox import FRAME_BYTES, TorchMailbox
from pearl_ray.cluster.mailbox import Mailbox, ShmMailbox
from pearl_ray.cluster.nccl_mailbox import NcclMailbox
from pearl_ray.cluster.shm_group import ShmGroup
from pearl_ray.cluster.torch_group import Backend, TorchGroup, join_store, serve_store
from pearl_ray.core.comm import Group, SingleGroup


class StoreServer:
    """A store that this process serves for as long as the object lives."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self._store, port = serve_store(host, timeout_s)
        self.address = f"{host}:{port}"


def join_group(
    transport: Transport, meeting_point: str, rank: int, size: int, *, host: str | None, timeout_s: float
) -> Group:
    """Meet the other ranks of a model; returns when all are there.

    Raises:
        TimeoutError: a rank didn't come within ``timeout_s``.
    """
    if transport == "single":
        assert size == 1
        return SingleGroup()
    if transport == "shm":
        return ShmGroup(meeting_point, rank, size, timeout_s=timeout_s)
    store, name = _store(meeting_point, timeout_s)
    return TorchGroup(transport, store, rank, size, timeout_s, name=name, host=host)


def open_mailbox(
    transport: Transport,
    meeting_point: str,
    party: int,
    num_readers: int,
    *,
    host: str | None,
    timeout_s: float,
    frame_bytes: int = FRAME_BYTES,
    behind_queue: bool = True,
    spin_s: float = 50e-6,
) -> Mailbox:
    """One end of a mailbox: party 0 writes, 1 … ``num_readers`` read. NCCL uses the current CUDA device.

    Args:
        frame_bytes: what the usual message takes, header included; the same for all parties.
        behind_queue: see ``NcclMailbox``. spin_s: see ``ShmMailbox``.

    Raises:
        TimeoutError, ConnectionError: a party didn't come within ``timeout_s``, or went away.
    """
    assert transport in ("shm", "gloo", "nccl")
    if transport == "shm":
        return ShmMailbox(meeting_point, party, num_readers, timeout_s=timeout_s, spin_s=spin_s)
    store, name = _store(meeting_point, timeout_s)
    backend: Backend = "nccl" if transport == "nccl" else "gloo"
    group = TorchGroup(backend, store, party, num_readers + 1, timeout_s, name=name, host=host)
    try:
        if backend == "gloo":
            return TorchMailbox(group, frame_bytes=frame_bytes)
        device = torch.device("cuda", torch.cuda.current_device())
        return NcclMailbox(group, device, frame_bytes=frame_bytes, behind_queue=behind_queue, timeout_s=timeout_s)
    except BaseException:
        group.close()
        raise


def _store(meeting_point: str, timeout_s: float) -> tuple[Store, str]:
    address, _, name = meeting_point.partition("/")
    host, _, port = address.rpartition(":")
    return join_store(host, int(port), timeout_s), name
