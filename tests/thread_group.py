"""A tensor-parallel group whose ranks are threads of the test: enough to run sharded code without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

PATIENCE_S = 120.0  # for a rank that doesn't come: loaded machines stall


class ThreadGroup:
    """One rank; all ranks share a barrier and a board."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[torch.Tensor | None]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._barrier.wait(PATIENCE_S)
        self._board[self.rank] = x.clone()
        self._barrier.wait(PATIENCE_S)
        return [part for part in self._board if part is not None]

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(x)
        x.zero_()
        for part in parts:
            x += part
        return x

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        assert x.shape[-1] == sizes[self.rank]
        return torch.cat(self._exchange(x), dim=-1)

    def broadcast_(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        return x.copy_(self._exchange(x)[source])

    def abort(self) -> None:
        self._barrier.abort()

    def close(self) -> None:
        pass


def on_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """``work`` of every rank at once, results in rank order; an error of one rank ends them all."""
    barrier = threading.Barrier(size)
    board: list[torch.Tensor | None] = [None] * size

    def run(rank: int) -> T:
        group = ThreadGroup(rank, size, barrier, board)
        try:
            return work(group)
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
