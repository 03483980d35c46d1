"""A mailbox over NCCL: frames staged through pinned memory, broadcast on a stream of their own, never captured.

Knows streams, events and a ``TorchGroup``. Knows nothing of rounds or of what else runs on the device, but for one rule
(docs/decisions/0010): a receive starts behind what the calling thread has queued, where that holds other collectives.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from pearl_ray.cluster.framed_mailbox import FAR_S, FRAME_BYTES, PIECE_BYTES, FramedMailbox
from pearl_ray.cluster.mailbox import WRITER
from pearl_ray.cluster.shm import wait_until
from pearl_ray.cluster.torch_group import TorchGroup

_HIGH_PRIORITY = -1


class NcclMailbox(FramedMailbox):
    """One writer, several readers, a GPU each. Constructing is collective: NCCL connects at the first broadcast.

    ``receive`` posts its broadcast when it is called, not before, so that every process issues all its collectives in
    one global order, of which each can end without any later one. A send starts at once, beside a forward pass that is
    queued already: it brings bytes of the host, and the draft is idle until it has a verdict.

    A message that doesn't come is a ``TimeoutError``, and the broadcast stays posted until :meth:`abort`, :meth:`close`
    or NCCL's watchdog (a few seconds behind the group's own deadline) ends it; from then on calls raise
    ``ConnectionError``.

    Args:
        group: NCCL with a CUDA ``device``; gloo with ``device`` cpu, where the same staging, framing and deadlines run
            without streams.
        device: of this process; no two parties may share one.
        behind_queue: a reader's device spins only from the end of what is queued on the caller's current stream (a
            forward with its all-reduces) until the message is there. False where the reader's model has one rank, hence
            no collectives: the wait overlaps the forward.
        timeout_s: how long the first broadcast waits for all parties.
    """

    def __init__(
        self,
        group: TorchGroup,
        device: torch.device,
        *,
        frame_bytes: int = FRAME_BYTES,
        piece_bytes: int = PIECE_BYTES,
        behind_queue: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        self._on_device = device.type == "cuda"
        assert group.backend == ("nccl" if self._on_device else "gloo")
        size = max(frame_bytes, piece_bytes)
        self._host_N = torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_device)
        self._device_N = torch.zeros(size, dtype=torch.uint8, device=device)
        self._writes = group.rank == WRITER
        self._behind_queue = behind_queue and not self._writes
        if self._on_device:
            self._stream: Any = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the buffers are there
            self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        super().__init__(group, self._host_N, frame_bytes)
        if self._writes:
            self.send(b"", timeout_s)
            self._finish_sent(time.monotonic() + timeout_s)
        else:
            self.receive(timeout_s)

    def _start(self, num_bytes: int) -> None:
        host_N, device_N = self._in_use = self._host_N[:num_bytes], self._device_N[:num_bytes]
        if not self._on_device:
            if self._writes:
                device_N.copy_(host_N)
            self._group.start_broadcast(device_N, WRITER, FAR_S)
            return
        assert not torch.cuda.is_current_stream_capturing(), "the bridge is never captured in a graph"
        if self._behind_queue:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            if self._writes:
                device_N.copy_(host_N, non_blocking=True)
            self._group.broadcast_(device_N, WRITER)
            if not self._writes:
                host_N.copy_(device_N, non_blocking=True)
            self._done.record()

    def _finish(self, timeout_s: float) -> None:
        if not self._on_device:
            self._group.finish(timeout_s, keep=True)
            if not self._writes:
                host_N, device_N = self._in_use
                host_N.copy_(device_N)
            return

        def ready() -> bool:
            self._group.check()
            return bool(self._done.query())

        if not wait_until(ready, timeout_s):
            raise TimeoutError(f"rank {self._group.rank} of a mailbox: no peer on the device in {timeout_s:g} s")
        self._group.check()  # a broadcast that NCCL's watchdog ended looks done
