"""A tensor-parallel group on one host: collectives through shared memory, summed in rank order.

Knows CPU tensors and a shared arena (tensors of one GPU are staged through the host). Knows nothing of Ray, models, or
torch.distributed. Each rank has two slots that alternate from one exchange to the next, so one barrier per exchange is
enough: a rank that writes exchange k + 2 has passed the barrier of k + 1, which all reach only after reading k.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch

from pearl_ray.cluster.shm import CACHE_LINE_WORDS, HEADER_BYTES, SharedArena, fence, wait_until

_TWO_STEP_BYTES = 32 * 1024  # above this each rank sums its own part only: n reads in all instead of n squared
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_NUMPY_BITS: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}
_TORCH_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_SUMS: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
}

_WORD_0 = HEADER_BYTES // 8
_WORD_ABORTED, _WORD_MISSING = _WORD_0, _WORD_0 + 1  # 1 + the rank that aborted; a bit per rank it waited for
_WORD_ARRIVED = _WORD_0 + CACHE_LINE_WORDS  # one cache line per rank: the number of its last exchange


class ShmGroup:
    """Implements ``pearl_ray.core.comm.Group`` for the ranks of one host.

    Sums are taken in rank order, hence the same bits on every rank and in every run; bfloat16 and float16 are summed
    in float32 and rounded once. A call that fails leaves the group unusable, on all ranks: make a new one.

    Args:
        arena: the same path for all ranks (``shm.arena_path()``); rank 0 creates it, the others wait for it.
        rank: 0 … size - 1.
        size: number of ranks, at most 62.
        capacity_bytes: of one slot, of which there are ``2 * size``; larger payloads go in parts.
        timeout_s: deadline of each call, in seconds.
    """

    def __init__(
        self, arena: str | SharedArena, rank: int, size: int, *, capacity_bytes: int = 1 << 20, timeout_s: float = 60.0
    ) -> None:
        assert 0 <= rank < size <= 62 and capacity_bytes >= 64
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._capacity = -(-capacity_bytes // 64) * 64
        self._slots_at = HEADER_BYTES + 64 * (1 + size)
        num_bytes = self._slots_at - HEADER_BYTES + 2 * size * self._capacity
        if isinstance(arena, str):
            create = rank == 0
            arena = SharedArena.create(num_bytes, size, arena) if create else SharedArena.attach(arena, timeout_s)
        assert arena.size >= num_bytes, f"an arena of {arena.size} bytes, {num_bytes} wanted: capacities differ"
        arena.arrive(rank)
        self._arena: SharedArena = arena
        self._words = arena.words
        self._closed = False
        self._exchange = 0
        # spinning only steals the core from the rank that is waited for when there are fewer cores than ranks
        self._spin_s = 50e-6 if size <= len(os.sched_getaffinity(0)) else 0.0
        self._views: dict[tuple[np.dtype, int, int, int, int], np.ndarray] = {}

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks, in rank order, in place; any shape; float or int64/int32."""
        if self._must_stage(x):
            return x.copy_(self.all_reduce_(_on_host(x)))
        if x.dtype not in _NUMPY_SUMS and x.dtype not in _LOW_PRECISION:
            raise ValueError(f"dtype={x.dtype} is not allowed: all_reduce_ sums float and int64/int32 tensors")
        if self.size == 1:
            return x
        flat_N = _bits(x).reshape(-1)
        per_slot = self._capacity // flat_N.itemsize
        for start in range(0, len(flat_N), per_slot):
            self._sum_part(flat_N[start : start + per_slot], x.dtype)
        return x

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenate along the last dimension: rank r holds ``[..., sizes[r]]``, the result ``[..., sum(sizes)]``."""
        assert len(sizes) == self.size and x.shape[-1] == sizes[self.rank], f"{tuple(x.shape)} for sizes {list(sizes)}"
        if self._must_stage(x):
            return self.all_gather(_on_host(x), sizes).to(x.device)
        result = torch.empty(*x.shape[:-1], sum(sizes), dtype=x.dtype)
        num_rows = math.prod(x.shape[:-1])
        source_RC = _bits(x).reshape(num_rows, x.shape[-1])
        result_RC = _bits(result).reshape(num_rows, sum(sizes))
        per_slot = self._capacity // x.element_size()
        widest = max(sizes)
        columns = min(widest, per_slot)
        rows = max(1, per_slot // max(1, columns))
        for row in range(0, num_rows, rows):
            last_row = min(row + rows, num_rows)
            for column in range(0, widest, columns):
                part = slice(column, min(column + columns, widest))
                self._gather_part(source_RC[row:last_row], result_RC[row:last_row], part, sizes)
        return result

    def broadcast_(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Copy rank ``source``'s ``x`` to all ranks, in place; any shape and type."""
        assert 0 <= source < self.size
        if self._must_stage(x):
            return x.copy_(self.broadcast_(_on_host(x), source))
        flat_N = _bits(x).reshape(-1)
        per_slot = self._capacity // flat_N.itemsize
        for start in range(0, len(flat_N), per_slot):
            part_N = flat_N[start : start + per_slot]
            view_N = self._slot(source, part_N.dtype, 0, len(part_N))
            if self.rank == source:
                view_N[:] = part_N
            self._barrier()
            if self.rank != source:
                part_N[:] = view_N
        return x

    def abort(self) -> None:
        """Make every pending and later call of every rank raise ``ConnectionError``; safe from another thread."""
        self._mark_aborted(0)

    def close(self) -> None:
        """Give the memory back. Later calls raise ``ConnectionError``; peers run into their deadlines."""
        if not self._closed:
            self._closed = True
            self._views.clear()
            self._arena.close()

    def _must_stage(self, x: torch.Tensor) -> bool:
        return x.device.type != "cpu" or not x.is_contiguous()

    def _mark_aborted(self, missing: int) -> None:
        try:
            if not self._words[_WORD_ABORTED]:
                self._words[_WORD_MISSING] = missing
                self._words[_WORD_ABORTED] = self.rank + 1
        except ValueError:  # the arena was released by close(): nothing is pending here any more
            assert self._closed

    def _slot(self, rank: int, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` of ``rank``'s slot of the coming exchange."""
        if self._closed:
            raise ConnectionError("the group is closed")
        parity = (self._exchange + 1) & 1
        key = (dtype, rank, parity, start, stop)
        view = self._views.get(key)
        if view is None:
            if len(self._views) > 2048:
                self._views.clear()
            at = self._slots_at + (2 * rank + parity) * self._capacity + start * dtype.itemsize
            view = self._views[key] = np.frombuffer(self._arena.buffer, dtype, stop - start, at)
        return view

    def _sum_part(self, part_N: np.ndarray, dtype: torch.dtype) -> None:
        """One slot's worth of an all-reduce, ``part_N`` the bits of this rank's values, replaced by the sum's."""
        count = len(part_N)
        self._slot(self.rank, part_N.dtype, 0, count)[:] = part_N
        if self.size == 2 or part_N.nbytes < _TWO_STEP_BYTES:
            views = [self._slot(rank, part_N.dtype, 0, count) for rank in range(self.size)]
            self._barrier()
            _sum_in_order(views, part_N, dtype)
            return
        bounds = [count * rank // self.size for rank in range(self.size + 1)]
        low, high = bounds[self.rank], bounds[self.rank + 1]
        views = [self._slot(rank, part_N.dtype, low, high) for rank in range(self.size)]
        self._barrier()
        _sum_in_order(views, self._slot(self.rank, part_N.dtype, low, high), dtype)
        views = [self._slot(r, part_N.dtype, bounds[r], bounds[r + 1]) for r in range(self.size)]
        self._barrier()
        for rank, view in enumerate(views):
            part_N[bounds[rank] : bounds[rank + 1]] = view

    def _gather_part(self, source_RC: np.ndarray, result_RC: np.ndarray, part: slice, sizes: Sequence[int]) -> None:
        """Columns ``part`` of each rank's rows, at most a slot's worth."""
        num_rows = len(source_RC)
        width = [max(0, min(part.stop, size) - part.start) for size in sizes]
        if width[self.rank]:
            mine_N = self._slot(self.rank, source_RC.dtype, 0, num_rows * width[self.rank])
            columns = slice(part.start, part.start + width[self.rank])
            mine_N.reshape(num_rows, width[self.rank])[:] = source_RC[:, columns]
        views = [self._slot(rank, source_RC.dtype, 0, num_rows * width[rank]) for rank in range(self.size)]
        self._barrier()
        offset = part.start
        for rank, view_N in enumerate(views):
            if width[rank]:
                result_RC[:, offset : offset + width[rank]] = view_N.reshape(num_rows, width[rank])
            offset += sizes[rank]

    def _barrier(self) -> None:
        """Publish this rank's slot and wait for all the others'."""
        words = self._words
        try:
            if words[_WORD_ABORTED]:
                self._raise_aborted()
            fence()
            self._exchange += 1
            words[_WORD_ARRIVED + CACHE_LINE_WORDS * self.rank] = self._exchange
            pending = [rank for rank in range(self.size) if rank != self.rank]
            if not self._drop_arrived(pending) and not wait_until(
                lambda: self._drop_arrived(pending), self.timeout_s, spin_s=self._spin_s
            ):
                self._mark_aborted(sum(1 << rank for rank in pending))
                raise TimeoutError(
                    f"rank {self.rank} of {self.size}: ranks {pending} did not arrive within {self.timeout_s:g} s"
                )
            fence()
        except ValueError as error:  # the arena's words were released by close() in another thread
            assert self._closed
            raise ConnectionError("the group was closed") from error

    def _drop_arrived(self, pending: list[int]) -> bool:
        """Take the ranks that have arrived off ``pending``; True when none is left."""
        words, exchange = self._words, self._exchange
        while pending:
            if words[_WORD_ARRIVED + CACHE_LINE_WORDS * pending[-1]] < exchange:
                if words[_WORD_ABORTED] or self._closed:
                    self._raise_aborted()
                pending[:] = [r for r in pending if words[_WORD_ARRIVED + CACHE_LINE_WORDS * r] < exchange]
                return not pending
            pending.pop()
        return True

    def _raise_aborted(self) -> None:
        if self._closed:
            raise ConnectionError("the group was closed")
        aborter, missing = self._words[_WORD_ABORTED] - 1, self._words[_WORD_MISSING]
        why = f", which waited in vain for ranks {[r for r in range(self.size) if missing >> r & 1]}" if missing else ""
        raise ConnectionError(f"the group was aborted by rank {aborter}{why}")


def _on_host(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _bits(x: torch.Tensor) -> np.ndarray:
    """``x``'s memory as unsigned integers of its element size (numpy has no bfloat16)."""
    return x.detach().view(_TORCH_BITS[x.element_size()]).numpy().view(_NUMPY_BITS[x.element_size()])


def _sum_in_order(views: list[np.ndarray], out: np.ndarray, dtype: torch.dtype) -> None:
    """``((v0 + v1) + v2) + …`` into ``out``; all are bits of ``dtype``. ``out`` may overlap none of ``views``."""
    if dtype in _LOW_PRECISION:
        parts = [torch.from_numpy(view.view(np.int16)).view(dtype) for view in views]
        total = parts[0].to(torch.float32)
        for part in parts[1:]:
            total += part
        torch.from_numpy(out.view(np.int16)).view(dtype).copy_(total)
        return
    numbers = _NUMPY_SUMS[dtype]
    total_N = out.view(numbers)
    np.add(views[0].view(numbers), views[1].view(numbers), out=total_N)
    for view in views[2:]:
        np.add(total_N, view.view(numbers), out=total_N)
