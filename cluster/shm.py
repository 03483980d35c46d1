"""Shared memory of one host: a file under /dev/shm, mapped by several processes, and how to wait for its words.

Knows files, bytes and 64-bit words. Knows nothing of tensors, messages, Ray, or what the words mean.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import platform
import secrets
import tempfile
import threading
import time
from collections.abc import Callable

from pearl_ray.core.errors import OutOfMemoryError

HEADER_BYTES = 4096  # a page: magic, size, number of parties, one word per party; the users' bytes follow
CACHE_LINE_WORDS = 8  # words that different processes write stand this far apart

_MAGIC = 0x7065_6172_6C31
_WORD_MAGIC, _WORD_SIZE, _WORD_PARTIES, _WORD_FIRST_PARTY = 0, 1, 2, 8
_MAX_PARTIES = HEADER_BYTES // 8 - _WORD_FIRST_PARTY

_STORES_ARE_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
_fence_lock = threading.Lock()


def fence() -> None:
    """Keep this thread's memory accesses before the call ahead of those after it, as other processes see them.

    x86 keeps stores in order and loads in order by itself. Elsewhere two uncontended lock round trips do it: what
    stands before is ordered before the first release, which is ordered before the second acquire.
    """
    if not _STORES_ARE_ORDERED:
        with _fence_lock:
            pass
        with _fence_lock:
            pass


def wait_until(ready: Callable[[], bool], timeout_s: float, *, spin_s: float = 50e-6, yield_s: float = 2e-4) -> bool:
    """Wait for ``ready()``; False at the deadline. What ``ready`` raises goes through.

    Spins for ``spin_s``, then gives the core away after each look for ``yield_s`` (on two cores with seven ranks the
    one waited for must get to run), then sleeps in growing steps of up to 100 µs: an idle wait costs 2 to 20 % of a
    core, as the machine's timers go.
    """
    if ready():
        return True
    start = time.monotonic()
    now = start
    while now - start < spin_s:
        if ready():
            return True
        now = time.monotonic()
    while now - start < yield_s:
        os.sched_yield()
        if ready():
            return True
        now = time.monotonic()
    step = 20e-6
    while now - start < timeout_s:
        time.sleep(step)
        if ready():
            return True
        step = min(step * 1.5, 100e-6)
        now = time.monotonic()
    return ready()


def arena_path(label: str = "arena") -> str:
    """A fresh path for an arena; the file doesn't exist yet. Give it to all parties; one of them creates it."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    return os.path.join(folder, f"pearl-{label}-{os.getpid()}-{secrets.token_hex(8)}")


class SharedArena:
    """``size`` bytes shared by ``parties`` processes, by path.

    One party calls :meth:`create`, the others :meth:`attach` (in any order: attaching waits for the file), each then
    :meth:`arrive`. The file is unlinked as soon as the last one has arrived, so processes that are killed leave
    nothing behind; before that, the first :meth:`close` unlinks it.
    """

    def __init__(self, path: str, mapping: mmap.mmap) -> None:
        """Use :meth:`create` or :meth:`attach`."""
        self.path = path
        self._mapping = mapping
        self.buffer = memoryview(mapping)
        self.words = self.buffer.cast("q")  # signed 64-bit; one aligned store or load each
        self.size = len(mapping) - HEADER_BYTES

    @classmethod
    def create(cls, size: int, parties: int, path: str | None = None) -> SharedArena:
        """Make the file (mode 0600, zeroed, its memory committed) and map it.

        Raises:
            OutOfMemoryError: /dev/shm has less than ``size`` bytes free (a container's is often 64 MB).
            FileExistsError: ``path`` exists.
        """
        assert 1 <= parties <= _MAX_PARTIES
        path = path if path is not None else arena_path()
        total = HEADER_BYTES + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, total)  # else a full /dev/shm is a SIGBUS at the first store
            arena = cls(path, mmap.mmap(descriptor, total))
        except OSError as error:
            os.unlink(path)
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise OutOfMemoryError(
                    f"{os.path.dirname(path)} lacks {total} bytes of shared memory: enlarge it (docker: --shm-size=1g)"
                ) from error
            raise
        finally:
            os.close(descriptor)
        arena.words[_WORD_SIZE] = size
        arena.words[_WORD_PARTIES] = parties
        fence()
        arena.words[_WORD_MAGIC] = _MAGIC
        return arena

    @classmethod
    def attach(cls, path: str, timeout_s: float = 60.0) -> SharedArena:
        """Map an arena that another process creates; raises ``TimeoutError`` if it doesn't within ``timeout_s``."""
        found: list[SharedArena] = []

        def ready() -> bool:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            try:
                total = os.fstat(descriptor).st_size
                if total <= HEADER_BYTES:
                    return False
                arena = cls(path, mmap.mmap(descriptor, total))
            finally:
                os.close(descriptor)
            if arena.words[_WORD_MAGIC] != _MAGIC:
                arena._unmap()
                return False
            found.append(arena)
            return True

        if not wait_until(ready, timeout_s, spin_s=0.0):
            raise TimeoutError(f"shared memory {path} was not created within {timeout_s:g} s")
        fence()
        return found[0]

    def arrive(self, party: int) -> None:
        """Say that ``party`` (0-based) is attached; the last one to say so unlinks the file."""
        parties = self.words[_WORD_PARTIES]
        assert 0 <= party < parties, f"party {party} of {parties}"
        self.words[_WORD_FIRST_PARTY + party] = 1
        fence()
        if self.all_arrived():
            self.unlink()

    def all_arrived(self) -> bool:
        """Whether each party has arrived."""
        return all(self.words[_WORD_FIRST_PARTY + party] for party in range(self.words[_WORD_PARTIES]))

    def unlink(self) -> None:
        """Take the name away; the memory lives as long as somebody maps it. Harmless when done twice."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Unlink, and unmap unless a view is still held: then the memory goes with the last view."""
        self.unlink()
        self._unmap()

    def _unmap(self) -> None:
        with contextlib.suppress(BufferError):  # an array over the buffer lives on: another thread is inside a call
            self.words.release()
            self.buffer.release()
            self._mapping.close()
