"""What tensor-parallel code may ask of its peers. The implementations live in ``cluster``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Group(Protocol):
    """The ranks of one model's tensor-parallel group. Collective: all ranks make the same calls in the same order.

    Every call raises ``TimeoutError`` when a peer doesn't arrive within the group's deadline, and
    ``ConnectionError`` after :meth:`abort`.
    """

    rank: int
    size: int

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks, in rank order, in place; any shape and float type."""

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Concatenate along the last dimension: rank r holds ``[..., sizes[r]]``, the result ``[..., sum(sizes)]``."""

    def broadcast_(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Copy rank ``source``'s ``x`` to all ranks, in place."""

    def abort(self) -> None:
        """Make every pending and later call raise; safe from another thread."""

    def close(self) -> None:
        """Give back what the group holds. Not collective."""


class SingleGroup:
    """A group of one: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        assert list(sizes) == [x.shape[-1]]
        return x

    def broadcast_(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        assert source == 0
        return x

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass
