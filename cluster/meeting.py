"""Where processes find each other: groups and mailboxes by a transport's name and a meeting point. Knows no Ray.

A meeting point is a path in shared memory, chosen by anybody beforehand, or the ``host:port/name`` of a store that one
of the parties serves.
"""

from __future__ import annotations

from torch.distributed import Store

from pearl_ray.cluster.devices import Transport
from pearl_ray.cluster.mailbox import Mailbox, ShmMailbox, TorchMailbox
from pearl_ray.cluster.shm_group import ShmGroup
from pearl_ray.cluster.torch_group import TorchGroup, join_store, serve_store
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
    transport: Transport, meeting_point: str, party: int, num_readers: int, *, host: str | None, timeout_s: float
) -> Mailbox:
    """One end of a mailbox: party 0 writes, 1 … ``num_readers`` read."""
    if transport == "shm":
        return ShmMailbox(meeting_point, party, num_readers, timeout_s=timeout_s)
    store, name = _store(meeting_point, timeout_s)
    return TorchMailbox(TorchGroup("gloo", store, party, num_readers + 1, timeout_s, name=name, host=host))


def _store(meeting_point: str, timeout_s: float) -> tuple[Store, str]:
    address, _, name = meeting_point.partition("/")
    host, _, port = address.rpartition(":")
    return join_store(host, int(port), timeout_s), name
