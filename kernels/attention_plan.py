"""How the Triton attention kernel is launched: a pass's metadata, tile sizes, splits over the keys. Launches nothing.

Shapes: T query tokens, S sequences, G KV heads, B blocks of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import triton

MIN_SPLIT_KEYS = 128  # a part of the keys is at least this long
MAX_TILE = 128 * 128  # rows x width of a tile of query rows
FIXED_SPLIT_KEYS = 512  # a part of the keys of a fixed plan: one begins at every multiple
FIXED_ROWS = 32  # of a tile of a fixed plan


@dataclass(frozen=True, slots=True)
class TritonMetadata:
    """What the layers of one forward share.

    Attributes:
        query_start_S1, context_lens_S: int32 on the device; a sequence without query tokens is skipped, so batches of
            fewer sequences fit the same graph. Rows from the last ``query_start`` on keep whatever the output held.
        block_tables_SB: int32 or int64; entries behind a sequence's keys aren't read.
        slots_T: int64, -1 writes nothing.
        head_start_G1: int32, first query head of each KV head, and H.
        group_size: query heads of the widest group.
        max_query_len, max_context_len: bounds over the sequences, fixed where the forward is captured.
        block_size: of the cache.
        masks_T: int64, bit j: the row sees key ``window_starts[s] + j``; it sees every key before that. None: causal.
        window_starts_S: int32.
    """

    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    slots_T: torch.Tensor
    head_start_G1: torch.Tensor
    group_size: int
    max_query_len: int
    max_context_len: int
    block_size: int
    masks_T: torch.Tensor | None = None
    window_starts_S: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The launch: rows of a tile, keys of a block, tiles per sequence, parts of the keys, warps, pipeline stages.

    Attributes:
        is_fixed: what a row's result is made of, and in which order, depends on its position alone: one tile shape,
            parts of ``FIXED_SPLIT_KEYS`` keys, joined by the same kernel, products and sums rounded one by one.
    """

    rows: int
    block: int
    tiles: int
    splits: int
    warps: int
    stages: int
    is_fixed: bool = False

    @property
    def min_split_keys(self) -> int:
        """A part of the keys is at least this long; of a fixed plan, this long."""
        return FIXED_SPLIT_KEYS if self.is_fixed else MIN_SPLIT_KEYS


def make_plan(metadata: TritonMetadata, num_kv: int, head_dim: int, num_sms: int) -> Plan:
    """As few tiles as hold the query rows, and enough parts to give every multiprocessor two programs."""
    dim = triton.next_power_of_2(head_dim)
    most = min(128, MAX_TILE // dim)
    least = max(16, triton.next_power_of_2(metadata.group_size))
    rows = max(least, min(most, triton.next_power_of_2(metadata.max_query_len * metadata.group_size)))
    tiles = triton.cdiv(metadata.max_query_len, rows // metadata.group_size)
    block = 32 if dim == 256 else 64 if dim == 128 else 128
    programs = tiles * num_kv * len(metadata.context_lens_S)
    # A few parts that are long leave less to join; where a launch has many programs anyway, two run at a time.
    per_sm = 1 if programs * 8 <= num_sms else 2
    if (per_sm == 1 or metadata.max_context_len <= 1024) and rows <= 32 and dim < 256:
        block = 128
    splits = max(1, min(per_sm * num_sms // programs, triton.cdiv(metadata.max_context_len, MIN_SPLIT_KEYS)))
    return Plan(rows, block, tiles, splits, 8 if rows >= 128 else 4, 2 if block == 128 and dim == 128 else 3)


def make_fixed_plan(metadata: TritonMetadata, head_dim: int) -> Plan:
    """The plan whose parts begin at fixed positions, however many rows and sequences there are.

    ``attend`` makes parts of the larger of ``1 / splits`` of the keys and the least length: with as many parts as the
    longest sequence has least lengths, that is always the latter. What a tile's other rows see and this row doesn't
    comes as blocks that are masked for it as a whole, which leave its sums as they are, bit for bit.
    """
    dim = triton.next_power_of_2(head_dim)
    rows = max(FIXED_ROWS, triton.next_power_of_2(metadata.group_size))
    tiles = triton.cdiv(metadata.max_query_len, rows // metadata.group_size)
    block = 32 if dim == 256 else 64
    return Plan(rows, block, tiles, triton.cdiv(metadata.max_context_len, FIXED_SPLIT_KEYS), 4, 3, is_fixed=True)


def cut_up(starts: Sequence[int], lengths: Sequence[int], most: int) -> tuple[list[int], list[int], list[int]]:
    """Query starts, context lengths and owners of sequences of at most so many query tokens, instead of longer ones."""
    cut_starts, cut_lengths, owners = [starts[0]], [], []
    for owner, ((start, stop), length) in enumerate(zip(pairwise(starts), lengths, strict=True)):
        for at in range(start, stop, most):
            end = min(at + most, stop)
            cut_starts.append(end)
            cut_lengths.append(length - (stop - end))
            owners.append(owner)
    return cut_starts, cut_lengths, owners


def slices(metadata: TritonMetadata, most: int) -> Iterator[TritonMetadata]:
    """The same pass, so many sequences at a time."""
    num_seqs = len(metadata.context_lens_S)
    if num_seqs <= most:
        yield metadata
        return
    for start in range(0, num_seqs, most):
        part = slice(start, start + most)
        yield replace(
            metadata,
            query_start_S1=metadata.query_start_S1[start : start + most + 1],
            context_lens_S=metadata.context_lens_S[part],
            block_tables_SB=metadata.block_tables_SB[part],
            window_starts_S=None if metadata.window_starts_S is None else metadata.window_starts_S[part],
        )
