"""Mailboxes over broadcasts: frames of one size, longer messages in pieces; and the one over gloo.

Knows bytes, a host buffer that they leave from and arrive in, and a ``TorchGroup``. Knows nothing of rounds or Ray.
"""

from __future__ import annotations

import contextlib
import struct
import time
from abc import ABC, abstractmethod

import torch

from pearl_ray.cluster.mailbox import WRITER
from pearl_ray.cluster.torch_group import TorchGroup

FRAME_BYTES = 4096  # of a frame, where nobody says what the messages are
PIECE_BYTES = 1 << 20  # of a piece of a longer message: a rejection window of 256 sequences is one
FAR_S = 7 * 24 * 3600.0  # gloo's own deadline of a pending broadcast: an idle line is no error
_LINGER_S = 1.0  # how long close() waits for the last message to leave
_FRAME_HEADER = struct.Struct("<qq")  # number of the message, bytes of its payload


class FramedMailbox(ABC):
    """Messages as broadcasts of a group of their own, rank 0 the writer; what a broadcast is, the subclass says.

    A message is one frame of fixed size: its number and length, then as much of the payload as fits. What doesn't fit
    follows in pieces of at most ``len(staging_N)`` bytes, whose sizes the readers know from the frame. So the usual
    message is one broadcast, posted without knowing its length, and nothing is allocated per message.

    One broadcast is under way at a time. A send returns with its last one under way, and the next send waits for it:
    a writer is at most one message ahead of the slowest reader. The number tells a frame from what a broadcast leaves
    in the buffer that was ended half-way.

    Args:
        group: the writer and its readers.
        staging_N: uint8 on the host; broadcasts leave from and arrive in its first bytes.
        frame_bytes: the same for all parties, header included.
    """

    def __init__(self, group: TorchGroup, staging_N: torch.Tensor, frame_bytes: int) -> None:
        assert _FRAME_HEADER.size < frame_bytes <= len(staging_N)
        self._group, self._frame_bytes = group, frame_bytes
        self._buffer = staging_N.numpy().data
        self._under_way = False
        self._num_messages = 0
        self._length = -1  # reader: of the message whose frame has come, of which ``_parts`` are there
        self._parts: list[bytes] = []

    @abstractmethod
    def _start(self, num_bytes: int) -> None:
        """Begin a broadcast of the first ``num_bytes`` of the staging buffer."""

    @abstractmethod
    def _finish(self, timeout_s: float) -> None:
        """Wait for it; after a ``TimeoutError`` it is still under way. ``ConnectionError`` if it was ended."""

    def send(self, payload: bytes, timeout_s: float) -> None:
        """Broadcast ``payload``; ``TimeoutError`` ends the mailbox: a reader didn't take what came before."""
        assert self._group.rank == WRITER
        deadline = time.monotonic() + timeout_s
        self._finish_sent(deadline)
        start = _FRAME_HEADER.size
        sent = min(len(payload), self._frame_bytes - start)
        _FRAME_HEADER.pack_into(self._buffer, 0, self._num_messages, len(payload))
        self._buffer[start : start + sent] = payload[:sent]
        self._begin(self._frame_bytes)
        while sent < len(payload):
            self._finish_sent(deadline)
            piece = payload[sent : sent + len(self._buffer)]
            self._buffer[: len(piece)] = piece
            self._begin(len(piece))
            sent += len(piece)
        self._num_messages += 1

    def receive(self, timeout_s: float) -> bytes:
        """The next message; after a ``TimeoutError`` its broadcast is still under way, and the next call's."""
        assert self._group.rank != WRITER
        deadline = time.monotonic() + timeout_s
        while True:
            received = sum(map(len, self._parts))
            expected = self._frame_bytes if self._length < 0 else min(self._length - received, len(self._buffer))
            if not self._under_way:
                self._begin(expected)
            self._finish(deadline - time.monotonic())
            self._under_way = False
            self._parts.append(self._unpack() if self._length < 0 else bytes(self._buffer[:expected]))
            if sum(map(len, self._parts)) == self._length:
                message = b"".join(self._parts)
                self._num_messages += 1
                self._length, self._parts = -1, []
                return message

    def abort(self) -> None:
        """Make every pending and later call of this end raise; the others run into their deadlines."""
        self._group.abort()

    def close(self) -> None:
        """Leave the group; what was sent last gets a moment to arrive."""
        try:
            if self._group.rank == WRITER:
                with contextlib.suppress(TimeoutError, ConnectionError):
                    self._finish_sent(time.monotonic() + _LINGER_S)
        finally:
            self._group.close()

    def _begin(self, num_bytes: int) -> None:
        self._start(num_bytes)
        self._under_way = True

    def _finish_sent(self, deadline: float) -> None:
        """Writer: the buffer is free again. A reader that doesn't come in time ends the mailbox."""
        if not self._under_way:
            return
        try:
            self._finish(deadline - time.monotonic())
        except TimeoutError:
            self._group.abort()
            raise
        self._under_way = False

    def _unpack(self) -> bytes:
        """The part of the payload that came in the frame."""
        number, self._length = _FRAME_HEADER.unpack_from(self._buffer)
        if number != self._num_messages:
            self._group.abort()
            raise ConnectionError(
                f"message {self._num_messages} was due and not message {number}: a broadcast was ended"
            )
        start = _FRAME_HEADER.size
        return bytes(self._buffer[start : start + min(self._length, self._frame_bytes - start)])


class TorchMailbox(FramedMailbox):
    """A mailbox between hosts, over gloo.

    A deadline of gloo's own would break the connection, so broadcasts have a far one and ours is kept by looking.
    """

    def __init__(self, group: TorchGroup, *, frame_bytes: int = FRAME_BYTES, piece_bytes: int = PIECE_BYTES) -> None:
        assert group.backend == "gloo"
        self._staging_N = torch.zeros(max(frame_bytes, piece_bytes), dtype=torch.uint8)
        super().__init__(group, self._staging_N, frame_bytes)

    def _start(self, num_bytes: int) -> None:
        self._group.start_broadcast(self._staging_N[:num_bytes], WRITER, FAR_S)

    def _finish(self, timeout_s: float) -> None:
        self._group.finish(timeout_s, keep=True)
