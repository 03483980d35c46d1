"""From lists of tokens to the tensors of one forward pass. Knows the paged layout; nothing of requests or rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pearl_ray.core.batch import ForwardBatch


class Entry(NamedTuple):
    """One sequence's part of a pass: its tokens from position ``start``, its blocks, how many last rows give logits.

    ``seq_id`` tells whose block table it is to those who keep tables on the device; -1: nobody's.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    num_outputs: int
    seq_id: int = -1


def make_batch(entries: Sequence[Entry], block_size: int, device: torch.device) -> ForwardBatch:
    """A varlen batch of the entries in their order; every entry has at least one token and blocks for all of them."""
    counts = [len(entry.tokens) for entry in entries]
    query_start = [0]
    for count in counts:
        query_start.append(query_start[-1] + count)
    tokens = np.fromiter((token for entry in entries for token in entry.tokens), np.int64, query_start[-1])
    widest = max(len(entry.blocks) for entry in entries)
    tables = np.zeros((len(entries), widest), dtype=np.int64)
    positions = np.empty(query_start[-1], dtype=np.int64)
    slots = np.empty(query_start[-1], dtype=np.int64)
    rows: list[np.ndarray] = []
    for index, entry in enumerate(entries):
        begin, end = query_start[index], query_start[index + 1]
        tables[index, : len(entry.blocks)] = entry.blocks
        where = np.arange(entry.start, entry.start + counts[index])
        positions[begin:end] = where
        slots[begin:end] = tables[index, where // block_size] * block_size + where % block_size
        assert (entry.start + counts[index] - 1) // block_size < len(entry.blocks), "blocks don't reach"
        rows.append(np.arange(end - entry.num_outputs, end))
    return ForwardBatch(
        token_ids_T=torch.from_numpy(tokens).to(device),
        positions_T=torch.from_numpy(positions).to(device),
        slots_T=torch.from_numpy(slots).to(device),
        query_start=tuple(query_start),
        context_lens=tuple(entry.start + count for entry, count in zip(entries, counts, strict=True)),
        block_tables_SB=torch.from_numpy(tables).to(device),
        output_rows_R=torch.from_numpy(np.concatenate(rows)).to(device),
    )
