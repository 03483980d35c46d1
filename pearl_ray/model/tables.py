"""Block tables on the device: one lane per sequence, sent as they grow. Knows blocks; knows no tokens or rounds."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class _Lane:
    index: int
    blocks: Sequence[int]
    known: int


class LaneTables:
    """The tables of up to ``num_lanes`` sequences.

    A sequence's ``blocks`` is a list that only grows at its end while the sequence is in the batch; another list under
    the same id is another stay in the batch, and starts anew.

    Attributes:
        tables_LB: int32 ``[num_lanes, max_blocks]`` on the device.
    """

    def __init__(self, num_lanes: int, max_blocks: int, device: torch.device) -> None:
        self.tables_LB = torch.zeros((num_lanes, max_blocks), dtype=torch.int32, device=device)
        self._host = torch.zeros((num_lanes, max_blocks), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._free = list(range(num_lanes))[::-1]
        self._lanes: dict[int, _Lane] = {}

    def lane(self, seq_id: int, blocks: Sequence[int]) -> int:
        """The sequence's lane, with the table up to date: queues a copy where it has grown."""
        lane = self._lanes.get(seq_id)
        if lane is None or lane.blocks is not blocks:
            index = lane.index if lane is not None else self._free.pop()
            lane = self._lanes[seq_id] = _Lane(index, blocks, 0)
        count = min(len(blocks), self._host.shape[1])
        if lane.known < count:
            some = slice(lane.known, count)
            self._host[lane.index, some] = torch.tensor(blocks[some], dtype=torch.int32)
            self.tables_LB[lane.index, some].copy_(self._host[lane.index, some], non_blocking=True)
            lane.known = count
        return lane.index

    def keep(self, seq_ids: Container[int]) -> None:
        """Take back the lanes of all other sequences."""
        for seq_id in [s for s in self._lanes if s not in seq_ids]:
            self._free.append(self._lanes.pop(seq_id).index)
