"""Mailboxes: one writer, several readers, messages of bytes, in order, none lost.

Knows bytes, deadlines and shared memory (``framed_mailbox`` and ``nccl_mailbox`` go over torch's process groups).
Knows nothing of rounds, windows or Ray. All kinds raise ``TimeoutError`` at a deadline and ``ConnectionError`` after
``abort``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

from pearl_ray.cluster.shm import CACHE_LINE_WORDS, HEADER_BYTES, SharedArena, fence, wait_until

WRITER = 0

_WORD_0 = HEADER_BYTES // 8
_WORD_ABORTED = _WORD_0  # 1 + the party that aborted
_WORD_WRITTEN = _WORD_0 + CACHE_LINE_WORDS  # fragments written so far
_WORD_READ = _WORD_0 + 2 * CACHE_LINE_WORDS  # one cache line per reader: fragments it has read


class Mailbox(Protocol):
    """One end of a one-to-many line of messages."""

    def send(self, payload: bytes, timeout_s: float) -> None:
        """Writer only: hand a message to every reader; waits, up to ``timeout_s``, while a reader lags behind."""

    def receive(self, timeout_s: float) -> bytes:
        """Reader only: the next message; after a ``TimeoutError`` the call may be repeated and loses nothing."""

    def abort(self) -> None:
        """Make every pending and later call raise ``ConnectionError``; safe from another thread."""

    def close(self) -> None:
        """Give back what this end holds."""


class ShmMailbox:
    """A ring of slots in shared memory, for the processes of one host.

    A message longer than a slot travels in fragments. Each reader acknowledges what it has read; the writer reuses a
    slot when all have. An abort by one party reaches all of them.

    Args:
        path: the same for all parties (``shm.arena_path()``); the writer creates it, the readers wait for it.
        party: 0 is the writer, 1 … ``num_readers`` are the readers.
        num_readers: at least 1.
        slot_bytes: payload bytes per slot.
        num_slots: how many slots the writer may be ahead of the slowest reader.
        timeout_s: how long attaching waits for the writer.
        spin_s: how long a wait keeps its core before it sleeps between looks; on one core it never does.
    """

    def __init__(
        self,
        path: str,
        party: int,
        num_readers: int,
        *,
        slot_bytes: int = 1 << 16,
        num_slots: int = 16,
        timeout_s: float = 60.0,
        spin_s: float = 50e-6,
    ) -> None:
        assert 0 <= party <= num_readers and num_readers >= 1 and slot_bytes >= 64 and num_slots >= 2
        self._party, self._num_readers, self._num_slots = party, num_readers, num_slots
        self._slot_bytes = -(-slot_bytes // 64) * 64
        self._stride = 64 + self._slot_bytes  # a line of two words (length, whether more follows), then the payload
        self._slots_at = HEADER_BYTES + 64 * (2 + num_readers)
        num_bytes = self._slots_at - HEADER_BYTES + num_slots * self._stride
        if party == WRITER:
            self._arena = SharedArena.create(num_bytes, num_readers + 1, path)
        else:
            self._arena = SharedArena.attach(path, timeout_s)
        assert self._arena.size >= num_bytes, "the parties of a mailbox disagree on its size"
        self._arena.arrive(party)
        self._words = self._arena.words
        self._closed = False
        self._num_written = 0
        self._num_read = 0
        self._partial: list[bytes] = []
        self._spin_s = spin_s if len(os.sched_getaffinity(0)) > 1 else 0.0

    def send(self, payload: bytes, timeout_s: float) -> None:
        """Hand ``payload`` to every reader; ``TimeoutError`` names the readers that lag, and ends the mailbox."""
        assert self._party == WRITER
        deadline = time.monotonic() + timeout_s
        view = memoryview(payload)
        start = 0
        while True:
            fragment = view[start : start + self._slot_bytes]
            start += self._slot_bytes
            self._write_fragment(fragment, start < len(view), deadline, timeout_s)
            if start >= len(view):
                return

    def receive(self, timeout_s: float) -> bytes:
        """The next message; a timeout in the middle of a long one keeps what has come."""
        assert self._party != WRITER
        deadline = time.monotonic() + timeout_s
        while True:
            fragment, more = self._read_fragment(deadline, timeout_s)
            if not more and not self._partial:
                return fragment
            self._partial.append(fragment)
            if not more:
                message = b"".join(self._partial)
                self._partial = []
                return message

    def abort(self) -> None:
        """Make every pending and later call of every party raise ``ConnectionError``."""
        try:
            if not self._words[_WORD_ABORTED]:
                self._words[_WORD_ABORTED] = self._party + 1
        except ValueError:  # released by close(): nothing is pending on this end, and it has nobody to tell any more
            assert self._closed

    def close(self) -> None:
        """Give the memory back; the other parties are not told."""
        if not self._closed:
            self._closed = True
            self._arena.close()

    def _write_fragment(self, fragment: memoryview, more: bool, deadline: float, timeout_s: float) -> None:
        try:
            words = self._words
            oldest_needed = self._num_written - self._num_slots + 1
            if not self._wait(lambda: not self._lagging(oldest_needed), deadline):
                lagging = self._lagging(oldest_needed)
                self.abort()
                raise TimeoutError(f"readers {lagging} of the mailbox did not keep up within {timeout_s:g} s")
            at = self._slots_at + (self._num_written % self._num_slots) * self._stride
            words[at // 8] = len(fragment)
            words[at // 8 + 1] = more
            self._arena.buffer[at + 64 : at + 64 + len(fragment)] = fragment
            fence()
            self._num_written += 1
            words[_WORD_WRITTEN] = self._num_written
        except ValueError as error:  # released by close() in another thread
            assert self._closed, str(error)
            raise ConnectionError("the mailbox was closed") from error

    def _read_fragment(self, deadline: float, timeout_s: float) -> tuple[bytes, bool]:
        try:
            words = self._words
            if not self._wait(lambda: words[_WORD_WRITTEN] > self._num_read, deadline):
                raise TimeoutError(f"no message came within {timeout_s:g} s")
            fence()
            at = self._slots_at + (self._num_read % self._num_slots) * self._stride
            length, more = words[at // 8], bool(words[at // 8 + 1])
            fragment = bytes(self._arena.buffer[at + 64 : at + 64 + length])
            fence()
            self._num_read += 1
            words[_WORD_READ + CACHE_LINE_WORDS * (self._party - 1)] = self._num_read
            return fragment, more
        except ValueError as error:  # released by close() in another thread
            assert self._closed, str(error)
            raise ConnectionError("the mailbox was closed") from error

    def _lagging(self, needed: int) -> list[int]:
        """The readers (0-based) that have read fewer than ``needed`` fragments."""
        words = self._words
        return [r for r in range(self._num_readers) if words[_WORD_READ + CACHE_LINE_WORDS * r] < needed]

    def _wait(self, ready: Callable[[], bool], deadline: float) -> bool:
        def look() -> bool:
            if self._words[_WORD_ABORTED]:
                raise ConnectionError(f"the mailbox was aborted by party {self._words[_WORD_ABORTED] - 1}")
            return ready()

        return wait_until(look, deadline - time.monotonic(), spin_s=self._spin_s)
