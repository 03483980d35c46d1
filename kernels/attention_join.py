"""Where a sequence's keys are cut into parts, and how the parts' results are joined (Dao et al., flash-decoding).

What ``attention_kernel`` and the kernel ``join`` share. Knows weights and sums; knows no queries, keys or values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_ray.kernels.overlap import follow


@triton.jit
def place(query_start, num_seqs, unit, TOKENS: tl.constexpr):
    """Sequence and tile of a unit. Units are the tiles that exist, sequence after sequence; behind the last: num_seqs.

    So a chunk of a prompt beside sequences of one token takes as many programs as it has tiles, not as many for each.
    """
    seq, first, before = unit * 0, unit * 0, unit * 0
    for start in range(0, num_seqs, 64):
        some = start + tl.arange(0, 64)
        exists = some < num_seqs
        begin = tl.load(query_start + some, mask=exists, other=0).to(tl.int32)
        length = tl.load(query_start + some + 1, mask=exists, other=0).to(tl.int32) - begin
        tiles = tl.cdiv(length, TOKENS)
        passed = exists & (before + tl.cumsum(tiles) <= unit)
        seq += tl.sum(passed.to(tl.int32))
        first += tl.sum(tl.where(passed, tiles, 0))
        before += tl.sum(tiles)
    return seq, unit - first


@triton.jit
def extent(
    query_start,
    context_lens,
    seq,
    tile,
    num_splits,
    min_blocks,
    alone_blocks,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """First query row of the sequence, its length, its keys before them, keys of this tile, blocks per part, parts."""
    begin = tl.load(query_start + seq).to(tl.int32)
    length = tl.load(query_start + seq + 1).to(tl.int32) - begin
    context = tl.load(context_lens + seq).to(tl.int32)
    old = context - length
    end = context if HAS_MASKS else old + tl.minimum((tile + 1) * TOKENS, length)
    num_blocks = tl.cdiv(end, BLOCK)
    per_split = tl.maximum(tl.cdiv(num_blocks, num_splits), min_blocks)
    per_split = tl.where(num_blocks <= alone_blocks, tl.maximum(per_split, num_blocks), per_split)
    return begin, length, old, end, per_split, tl.cdiv(num_blocks, per_split)


@triton.jit
def part_rows(token, head, num_kv, kv_head, num_splits, GROUP: tl.constexpr):
    """Where a row's parts begin, in rows: those of a token's heads lie together, one after the other."""
    return ((token.to(tl.int64) * num_kv + kv_head) * GROUP + head) * num_splits


@triton.jit
def _joined(partial, partial_top, first, used, dim, DIM: tl.constexpr):
    """The rows' weighted mean over ``used`` parts, four at a time; read past L1, for other programs wrote them."""
    acc = tl.zeros([first.shape[0], DIM], tl.float32)
    top = tl.full([first.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([first.shape[0]], tl.float32)
    at_top = partial_top + first
    at_part = partial + first[:, None] * DIM + dim[None, :]
    for split in range(0, used, 4):
        lse_0, part_0 = _part(at_top, at_part, split, used, DIM)
        lse_1, part_1 = _part(at_top, at_part, split + 1, used, DIM)
        lse_2, part_2 = _part(at_top, at_part, split + 2, used, DIM)
        lse_3, part_3 = _part(at_top, at_part, split + 3, used, DIM)
        new_top = tl.maximum(tl.maximum(tl.maximum(lse_0, lse_1), tl.maximum(lse_2, lse_3)), top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight_0, weight_1 = tl.exp2(lse_0 - base), tl.exp2(lse_1 - base)
        weight_2, weight_3 = tl.exp2(lse_2 - base), tl.exp2(lse_3 - base)
        acc = acc * shrink[:, None] + part_0 * weight_0[:, None]
        acc = acc + part_1 * weight_1[:, None]
        acc = acc + part_2 * weight_2[:, None]
        acc = acc + part_3 * weight_3[:, None]
        total = total * shrink + weight_0 + weight_1 + weight_2 + weight_3
        top = new_top
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _part(at_top, at_part, split, used, DIM: tl.constexpr):
    """A part's log-sum-exps and means; without weight behind the last."""
    exists = split < used
    lse = tl.load(at_top + split, mask=exists, other=float("-inf"), cache_modifier=".cg")
    part = tl.load(at_part + split * DIM, mask=exists, other=0.0, cache_modifier=".cg")
    return lse, part


@triton.jit
def store_joined(
    out, partial, partial_top, num_splits, used, row, token, length, begin, before, num_kv, kv_head,
    first_head, head_end, out_stride_t, out_stride_h,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Joins ``row``'s parts and stores those rows that exist. ``before``: query rows before the launch's first."""
    dim = tl.arange(0, DIM)
    here = begin - before + tl.minimum(token, length - 1)  # rows that don't exist read another's
    first = part_rows(here, row % GROUP, num_kv, kv_head, num_splits, GROUP)
    joined = _joined(partial, partial_top, first, used, dim, DIM)
    head = first_head + row % GROUP
    exists = (row < ROWS // GROUP * GROUP) & (token < length) & (head < head_end)
    out_at = out + ((begin + token).to(tl.int64) * out_stride_t + head * out_stride_h)[:, None] + dim[None, :]
    tl.store(out_at, joined.to(out.dtype.element_ty), mask=exists[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_seqs", "num_splits", "num_kv", "min_blocks", "alone_blocks"])
def join(
    out,
    query_start,
    context_lens,
    head_start,
    partial,
    partial_top,
    num_seqs,
    num_splits,
    num_kv,
    min_blocks,
    alone_blocks,
    out_stride_t,
    out_stride_h,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    ARE_TILES: tl.constexpr,
):
    """Grid (ROWS / SOME, KV heads, units): joins SOME rows of the parts of ``attend``."""
    TOKENS: tl.constexpr = ROWS // GROUP
    follow()
    piece, kv_head, unit = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, tile = unit, 0
    if ARE_TILES:
        seq, tile = place(query_start, num_seqs, unit, TOKENS)
        if seq >= num_seqs:
            return
    begin, length, _, _, _, used = extent(
        query_start, context_lens, seq, tile, num_splits, min_blocks, alone_blocks, TOKENS, BLOCK, HAS_MASKS
    )
    row = piece * SOME + tl.arange(0, SOME)
    token = tile * TOKENS + row // GROUP
    first_head, head_end = tl.load(head_start + kv_head), tl.load(head_start + kv_head + 1)
    if (used > 1) & (tile * TOKENS + piece * SOME // GROUP < length):
        store_joined(
            out, partial, partial_top, num_splits, used, row, token, length, begin, tl.load(query_start).to(tl.int32),
            num_kv, kv_head, first_head, head_end, out_stride_t, out_stride_h, HEAD_DIM, DIM, GROUP, ROWS,
        )  # fmt: skip
