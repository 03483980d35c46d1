"""How the Triton attention kernel is launched: a pass's metadata, tile sizes, parts of the keys. Launches nothing.

Shapes: T query tokens, S sequences, G KV heads, B blocks of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import triton

MIN_SPLIT_KEYS = 256  # a part of the keys is at least this long
ALONE_KEYS = 512  # so many keys are one part: joining parts takes as long as reading a few hundred more
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
        cuts: by plan, how the pass is cut into units: filled by the first layer's launch, for all.
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
    cuts: dict[Plan, torch.Tensor] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """The launch: rows of a tile, keys of a block, tiles per sequence, parts of the keys, warps, pipeline stages.

    Attributes:
        tiles: of the longest sequence, at most.
        parts: into which all tiles' keys together are cut, about equally long; those of a short tile are one more.
        min_keys: a part of the keys is at least this long,
        alone_keys: and keys up to so many are one part, for joining parts takes as long as reading some hundred keys.
        has_one_loop: every block is masked, and loaded ahead of its turn; else the last ones alone, on their turn.
        is_fixed: what a row's result is made of, and in which order, depends on its position alone: one tile shape,
            parts of ``FIXED_SPLIT_KEYS`` keys, joined by the same kernel, products and sums rounded one by one.
    """

    rows: int
    block: int
    tiles: int
    parts: int
    warps: int
    stages: int
    min_keys: int = MIN_SPLIT_KEYS
    alone_keys: int = 0
    has_one_loop: bool = False
    is_fixed: bool = False

    def most_tiles(self, metadata: TritonMetadata) -> int:
        """Tiles of all sequences, at most."""
        num_seqs = len(metadata.context_lens_S)
        if self.tiles == 1:
            return num_seqs
        return min(num_seqs * self.tiles, num_seqs + len(metadata.slots_T) // (self.rows // metadata.group_size))

    def most_units(self, metadata: TritonMetadata) -> int:
        """Parts of all tiles, at most."""
        tiles = self.most_tiles(metadata)
        beside = tiles if tiles > 1 else 0  # of one tile no part is shorter than the others by more than a block
        return min(self.parts + beside, tiles * triton.cdiv(metadata.max_context_len, self.min_keys))

    def most_slots(self, metadata: TritonMetadata) -> int:
        """Parts of tiles that have several, at most: those leave partial results."""
        if self.parts == 1 or metadata.max_context_len <= self.min_keys:
            return 0
        return min(2 * self.parts, self.most_units(metadata))


def scratch_tiles(num_sms: int) -> int:
    """Tiles of ``MAX_TILE`` that the scratch memory of partial results holds."""
    return 2 * num_sms


def make_plan(metadata: TritonMetadata, num_kv: int, head_dim: int, num_sms: int) -> Plan:
    """As few tiles as hold the query rows, and enough parts to give every multiprocessor two programs.

    With large tiles, of a prompt's chunk most likely, one: they compute more than they read, and two don't fit.
    """
    dim = triton.next_power_of_2(head_dim)
    most = min(128, MAX_TILE // dim)
    least = max(16, triton.next_power_of_2(metadata.group_size))
    rows = max(least, min(most, triton.next_power_of_2(metadata.max_query_len * metadata.group_size)))
    tiles = triton.cdiv(metadata.max_query_len, rows // metadata.group_size)
    block = 32 if dim == 256 else 64 if dim == 128 else 128  # 32 KiB of keys and values
    programs = num_kv * len(metadata.context_lens_S)
    if rows == 16 and dim == 128 and programs <= num_sms:
        return _plan_for_few(tiles, programs, num_kv, num_sms)
    # A few parts that are long leave less to join; where a launch has many programs anyway, two run at a time.
    per_sm = 1 if rows >= 128 or programs * 8 <= num_sms else 2
    # As many blocks on their way as leave room for two programs: three, or two beside a large tile of queries.
    stages = 4 if rows * dim <= 32 * 128 else 3
    # A small tile's time goes into finding its keys' addresses and the like: more warps have fewer of them each.
    warps = 8 if rows >= 128 or (rows == 16 and block >= 64) else 4
    # Masking a block costs a small tile next to nothing, and one loop has every block loaded ahead.
    parts = max(1, min(per_sm * num_sms, scratch_tiles(num_sms) * MAX_TILE // (2 * rows * dim)) // num_kv)
    return Plan(rows, block, tiles, parts, warps, stages, alone_keys=ALONE_KEYS, has_one_loop=rows <= 64)


def _plan_for_few(tiles: int, programs: int, num_kv: int, num_sms: int) -> Plan:
    """A query token of a few sequences, by a sweep on an H200 at 264 to 32,768 tokens (docs/performance.md)."""
    if programs * 8 <= num_sms:
        return Plan(16, 128, tiles, max(1, num_sms // num_kv), 8, 3, min_keys=128)
    parts = max(1, 2 * num_sms // num_kv)
    return Plan(16, 128, tiles, parts, 8, 2, alone_keys=ALONE_KEYS, has_one_loop=True)


def make_fixed_plan(metadata: TritonMetadata, head_dim: int) -> Plan:
    """The plan whose parts begin at fixed positions, however many rows and sequences there are.

    With as many parts for each tile as the longest sequence has least lengths, every part has that length. What a
    tile's other rows see and this row doesn't comes as blocks that are masked for it as a whole, which leave its sums
    as they are, bit for bit.
    """
    dim = triton.next_power_of_2(head_dim)
    rows = max(FIXED_ROWS, triton.next_power_of_2(metadata.group_size))
    tiles = triton.cdiv(metadata.max_query_len, rows // metadata.group_size)
    block = 32 if dim == 256 else 64
    parts = tiles * len(metadata.context_lens_S) * triton.cdiv(metadata.max_context_len, FIXED_SPLIT_KEYS)
    return Plan(rows, block, tiles, parts, 4, 3, min_keys=FIXED_SPLIT_KEYS, is_fixed=True)


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
            cuts={},
        )
