"""A tensor-parallel group over torch.distributed: gloo between hosts on CPU, NCCL between GPUs.

Knows torch's process groups, made directly: no default group, no global state, so that the draft's group, the target's
and the bridge live and die apart in one process. Knows nothing of Ray or models.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed

from pearl_ray.cluster.shm import wait_until

if TYPE_CHECKING:
    from torch._C._distributed_c10d import BroadcastOptions, Store, TCPStore, Work

dist: Any = torch.distributed  # its typed names are private ones

logger = logging.getLogger(__name__)

Backend = Literal["gloo", "nccl"]

_WATCHDOG_GRACE_S = 5.0  # how much later than synchronize() NCCL's watchdog acts
_NCCL_WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",  # at a deadline end the communicator; the default ends the process
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # without these three it first gathers traces, for over a minute
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "100",
    "TORCH_FR_BUFFER_SIZE": "0",
}
_DEVICE_SPIN_S = 0.1  # how long synchronize() looks without a pause: longer than a round takes
_CLOSE_S = 5.0  # how long close() waits for the connections to end; they end without it too

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def serve_store(host: str, timeout_s: float = 60.0) -> tuple[TCPStore, int]:
    """Open the meeting point of some groups on ``host``, on a port that the kernel chooses; returns it and the port.

    The process that holds the store must outlive the construction of the groups that meet there.
    """
    store = dist.TCPStore(host, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
    return store, int(store.port)


def join_store(host: str, port: int, timeout_s: float = 60.0) -> TCPStore:
    """Connect to a store of :func:`serve_store`."""
    store: TCPStore = dist.TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    return store


class TorchGroup:
    """Implements ``pearl_ray.core.comm.Group`` over gloo or NCCL.

    gloo: deterministic, since ``all_reduce_`` gathers and sums in rank order (bfloat16 and float16 in float32); a
    deadline raises at once and leaves the group unusable. CUDA tensors are staged through the host.

    NCCL: calls are queued on the current stream and return at once (capturable in CUDA graphs), so a peer that doesn't
    arrive shows where the host waits for the device: wait by :meth:`synchronize`, which has the deadline; NCCL's own
    watchdog stands behind it, a few seconds later. The order of a sum is NCCL's own, fixed for one topology.

    Args:
        backend: "gloo" or "nccl".
        store: where the ranks meet; each group needs a ``name`` of its own there.
        rank: 0 … size - 1.
        size: number of ranks.
        timeout_s: deadline of each call, in seconds; 30 minutes, torch's default, would hide a deadlock.
        name: the group's name in the store; never reused.
        host: this process's own IP address for gloo to listen on; None lets gloo resolve the host's name.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        rank: int,
        size: int,
        timeout_s: float = 60.0,
        *,
        name: str = "group",
        host: str | None = None,
    ) -> None:
        assert backend in ("gloo", "nccl") and 0 <= rank < size
        self.backend, self.rank, self.size, self.timeout_s = backend, rank, size, timeout_s
        self._name = name
        self._closed = self._aborted = False
        self._pending: Any = None
        self._ending: threading.Thread | None = None
        make = _make_gloo if backend == "gloo" else _make_nccl
        self._group: Any = make(dist.PrefixStore(f"pearl/{name}", store), rank, size, timeout_s, host)

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks, in rank order with gloo, in place; any shape and float type."""
        if self.size == 1:
            return x
        if self.backend == "nccl":
            self.check()
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.SUM
            self._queue(lambda: self._group.allreduce([_dense(x)], options))
            return x
        own = x.detach().to("cpu").contiguous()
        parts = self._gather_bytes(own)
        total = parts[0].to(torch.float32) if x.dtype in _LOW_PRECISION else parts[0]
        for part in parts[1:]:
            total += part
        return x.copy_(total)

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenate along the last dimension: rank r holds ``[..., sizes[r]]``, the result ``[..., sum(sizes)]``."""
        assert len(sizes) == self.size and x.shape[-1] == sizes[self.rank], f"{tuple(x.shape)} for sizes {list(sizes)}"
        if self.size == 1:
            return x
        widest = max(sizes)
        padded = x.detach()
        if x.shape[-1] < widest:
            padded = torch.nn.functional.pad(padded, (0, widest - x.shape[-1]))
        if self.backend == "nccl":
            self.check()
            gathered = torch.empty(self.size, *padded.shape, dtype=x.dtype, device=x.device)
            self._queue(lambda: self._group._allgather_base(gathered, padded.contiguous()))
            parts = list(gathered)
        else:
            parts = [part.to(x.device) for part in self._gather_bytes(padded.to("cpu").contiguous())]
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def broadcast_(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Copy rank ``source``'s ``x`` to all ranks, in place; any shape and type."""
        if self.size == 1:
            return x
        if self.backend == "nccl":
            self.check()
            self._queue(lambda: self._group.broadcast([_dense(x)], _broadcast_options(source)))
            return x
        own = x.detach().to("cpu").contiguous()
        self.start_broadcast(_bytes(own), source, self.timeout_s)
        self.finish(self.timeout_s)
        return x if own.data_ptr() == x.data_ptr() else x.copy_(own)

    def start_broadcast(self, x_N: torch.Tensor, source: int, timeout_s: float) -> None:
        """Queue a gloo broadcast of a flat CPU tensor, which must live until :meth:`finish` returns.

        ``timeout_s`` is gloo's own deadline, which breaks the connections; :meth:`finish` has a milder one.
        """
        self._raise_if_ended()
        assert self.backend == "gloo" and self._pending is None
        options = _broadcast_options(source)
        options.timeout = timedelta(seconds=timeout_s)
        try:
            self._pending = self._group.broadcast([x_N], options)
        except RuntimeError as error:
            raise self._failed(error) from error

    def finish(self, timeout_s: float, *, keep: bool = False) -> None:
        """Wait for the queued gloo call. At the deadline the group is spent, unless ``keep``: then call again."""
        work = self._pending
        if work is None:
            return

        def ready() -> bool:
            self._raise_if_ended()
            return bool(work.is_completed())

        if not wait_until(ready, timeout_s):
            if not keep:
                self.abort()
            raise TimeoutError(
                f"rank {self.rank} of {self.size} of {self._name}: a peer did not arrive in {timeout_s:g} s"
            )
        self._pending = None
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raise if the group has ended: aborted, closed, or by NCCL's watchdog."""
        self._raise_if_ended()
        get_error = getattr(self._group, "get_error", None) if self.backend == "nccl" else None
        if get_error is not None and (state := str(get_error())).rpartition(".")[2].upper() != "SUCCESS":
            raise self._failed(RuntimeError(state))

    def synchronize(self, timeout_s: float | None = None, event: torch.cuda.Event | None = None) -> None:
        """Wait on the host for ``event``, or for all that is queued on the current stream: a round's one wait.

        Raises ``TimeoutError`` if it isn't done within ``timeout_s`` seconds (the group's deadline if None): a peer is
        missing, and the group is aborted; ``ConnectionError`` if :meth:`abort` came meanwhile. What was computed is
        undefined then.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        self._raise_if_ended()
        if event is None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

        def ready() -> bool:
            self._raise_if_ended()
            return bool(event.query())

        if not wait_until(ready, timeout_s, spin_s=_DEVICE_SPIN_S):
            self.abort()
            raise TimeoutError(
                f"rank {self.rank} of {self.size} of {self._name}: the device did not finish in {timeout_s:g} s"
            )

    def abort(self) -> None:
        """Make every pending and later call raise ``ConnectionError``; safe from another thread.

        NCCL kernels that are waiting on the device end too. Peers see their deadline, or this end's :meth:`close`.
        """
        self._aborted = True
        if self.backend == "nccl":
            self._end()

    def close(self) -> None:
        """Leave the group. Not collective."""
        if self._closed:
            return
        self._closed = True
        self._end()
        assert self._ending is not None
        self._group = self._pending = None  # the thread holds the last reference: destroying waits too
        self._ending.join(_CLOSE_S)

    def _end(self) -> None:
        """End the connections, once, in a thread: NCCL ends its kernels at once and then may wait for its deadline."""
        if self._ending is None:
            self._ending = threading.Thread(target=_abort, args=(self._group, self._name), daemon=True)
            self._ending.start()

    def _gather_bytes(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's ``own`` (same shape and type everywhere, CPU, contiguous), in rank order, over gloo."""
        self._raise_if_ended()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        try:
            self._pending = self._group.allgather([[_bytes(part) for part in parts]], [_bytes(own)])
        except RuntimeError as error:
            raise self._failed(error) from error
        self.finish(self.timeout_s)
        return parts

    def _queue(self, call: Callable[[], Work]) -> None:
        """Make an NCCL call and order the current stream behind it; the host doesn't wait."""
        try:
            call().wait()
        except RuntimeError as error:
            raise self._failed(error) from error

    def _raise_if_ended(self) -> None:
        if self._closed or self._aborted:
            raise ConnectionError(f"the group {self._name} was {'closed' if self._closed else 'aborted'}")

    def _failed(self, error: RuntimeError) -> Exception:
        """torch reports all failures as ``RuntimeError``; the group is spent after any of them."""
        ended = self._aborted or self._closed
        self._aborted = True
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not ended and ("timed out" in reason.lower() or "timeout" in reason.lower()):
            return TimeoutError(f"rank {self.rank} of {self.size} of {self._name}: {reason}")
        return ConnectionError(f"rank {self.rank} of {self.size} of {self._name}: {reason}")


def _abort(group: object, name: str) -> None:
    """Without this, a destructor waits for what is pending. Holds ``group`` so that it is destroyed here."""
    abort = getattr(group, "abort", None)  # gloo has it since torch 2.7
    try:
        if abort is not None:
            abort()
    except RuntimeError as error:
        logger.debug("ending the group %s: %s", name, error)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


def _dense(x: torch.Tensor) -> torch.Tensor:
    assert x.is_contiguous(), "NCCL calls in place need a contiguous tensor"
    return x


def _broadcast_options(source: int) -> BroadcastOptions:
    options: BroadcastOptions = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = source, 0
    return options


def _make_gloo(store: Store, rank: int, size: int, timeout_s: float, host: str | None) -> object:
    group: Any = dist.ProcessGroupGloo
    options = group._Options()
    options._devices = [group.create_device(hostname=host) if host is not None else group.create_default_device()]
    options._timeout = timedelta(seconds=timeout_s)
    return _meet(lambda: group(store, rank, size, options), rank, size, timeout_s)


def _make_nccl(store: Store, rank: int, size: int, timeout_s: float, host: str | None) -> object:
    for variable, value in _NCCL_WATCHDOG.items():
        os.environ.setdefault(variable, value)
    group: Any = dist.ProcessGroupNCCL
    options = group.Options()
    options._timeout = timedelta(seconds=timeout_s + _WATCHDOG_GRACE_S)
    options.is_high_priority_stream = True
    return _meet(lambda: group(store, rank, size, options), rank, size, timeout_s)


def _meet(make: Callable[[], object], rank: int, size: int, timeout_s: float) -> object:
    """Construct a group; a peer that never comes is a ``TimeoutError``."""
    start = time.monotonic()
    try:
        return make()
    except RuntimeError as error:  # DistStoreError and gloo's own are RuntimeErrors
        kind = TimeoutError if time.monotonic() - start >= 0.9 * timeout_s else ConnectionError
        raise kind(f"rank {rank} of {size} met no complete group: {str(error).splitlines()[0]}") from error
