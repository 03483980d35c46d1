"""How a pass is cut into parts for programs, and how the parts' results are joined (Dao et al., flash-decoding).

What ``attention_kernel`` and the kernels ``cut`` and ``join`` share. Knows lengths, weights and sums; knows no keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_ray.kernels.overlap import follow


@triton.jit
def find(units, query_start, context_lens, unit, num_parts, min_blocks, HAS_UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence (-1: there is no such unit), tile, part, the tile's first slot, the sequence's first query row, its
    query tokens, its keys, blocks per part. See ``cut``.

    Without units there is one sequence of one tile, and ``unit`` is the part of its keys, of ``num_parts`` at most.
    """
    if HAS_UNITS:
        at = units + (1 + unit) * 8
        seq, tile, part, slot = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        begin, length, context = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
        return seq, tile, part, slot, begin, length, context, tl.load(units)
    begin, context = tl.load(query_start).to(tl.int32), tl.load(context_lens).to(tl.int32)
    per_part = tl.maximum(tl.cdiv(tl.cdiv(context, BLOCK), num_parts), min_blocks)
    none = unit * 0
    return none, none, unit, none, begin, tl.load(query_start + 1).to(tl.int32) - begin, context, per_part


@triton.jit
def extent(
    tile,
    length,
    context,
    per_part,
    alone_blocks,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """Keys that this tile sees, blocks per part, parts."""
    end = context if HAS_MASKS else context - length + tl.minimum((tile + 1) * TOKENS, length)
    whole = tl.cdiv(context, BLOCK)
    each = tl.where(whole <= alone_blocks, tl.maximum(whole, 1), per_part)
    return end, each, tl.cdiv(tl.cdiv(end, BLOCK), each)


@triton.jit
def _sizes(query_start, context_lens, seq, exists, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """First rows, query tokens and keys of sequences, their tiles and blocks; none where there is nothing to ask."""
    begin = tl.load(query_start + seq, mask=exists, other=0).to(tl.int32)
    length = tl.load(query_start + seq + 1, mask=exists, other=0).to(tl.int32) - begin
    context = tl.load(context_lens + seq, mask=exists & (length > 0), other=0).to(tl.int32)
    return begin, length, context, tl.cdiv(length, TOKENS), tl.cdiv(context, BLOCK)


@triton.jit(do_not_specialize=["num_seqs", "num_parts", "min_blocks", "alone_blocks", "num_units"])
def cut(
    units,
    query_start,
    context_lens,
    num_seqs,
    num_parts,
    min_blocks,
    alone_blocks,
    num_units,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOME: tl.constexpr,
):
    """Divides a pass among programs: a unit is a part of the keys of a tile of a sequence, all about equally long.

    Writes ``units`` int32 ``[1 + num_units, 8]``: blocks per part, and per unit sequence, tile, part, the tile's first
    slot for partial results (its parts have slots one after the other; a tile of one part has none), and of the
    sequence the first query row, query tokens and keys, so that a program needn't look them up one by one. So a long
    sequence among short ones has many parts, and a chunk of a prompt beside sequences of one token has a unit for each
    of its tiles while they have one each. Grid: SOME units each.
    """
    follow()
    seqs = tl.arange(0, 64)
    unit = tl.program_id(0) * SOME + tl.arange(0, SOME)
    total = tl.program_id(0) * 0
    for start in range(0, num_seqs, 64):
        exists = start + seqs < num_seqs
        _, _, _, tiles, blocks = _sizes(query_start, context_lens, start + seqs, exists, TOKENS, BLOCK)
        total += tl.sum(tiles * blocks)
    per_part = tl.maximum(tl.cdiv(total, num_parts), min_blocks)
    seq, first, slot, before = unit * 0, unit * 0, unit * 0, tl.program_id(0) * 0
    for start in range(0, num_seqs, 64):
        exists = start + seqs < num_seqs
        _, _, _, tiles, blocks = _sizes(query_start, context_lens, start + seqs, exists, TOKENS, BLOCK)
        parts = tl.where(blocks <= alone_blocks, 1, tl.cdiv(blocks, per_part))
        count = tiles * parts
        passed = ((before + tl.cumsum(count))[None, :] <= unit[:, None]) & exists[None, :]
        seq += tl.sum(passed.to(tl.int32), 1)
        first += tl.sum(tl.where(passed, count[None, :], 0), 1)
        slot += tl.sum(tl.where(passed & (parts > 1)[None, :], count[None, :], 0), 1)
        before += tl.sum(count)
    exists = unit < before
    begin, length, context, _, blocks = _sizes(query_start, context_lens, seq, exists, TOKENS, BLOCK)
    parts = tl.where(blocks <= alone_blocks, 1, tl.maximum(tl.cdiv(blocks, per_part), 1))
    tile, part = (unit - first) // parts, (unit - first) % parts
    at, inside = units + (1 + unit) * 8, unit < num_units
    tl.store(at, tl.where(exists, seq, -1), mask=inside)
    tl.store(at + 1, tile, mask=inside)
    tl.store(at + 2, part, mask=inside)
    tl.store(at + 3, slot + tile * parts, mask=inside)
    tl.store(at + 4, begin, mask=inside)
    tl.store(at + 5, length, mask=inside)
    tl.store(at + 6, context, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(units, per_part)


@triton.jit
def _joined(partial, partial_top, first, stride, used, dim, DIM: tl.constexpr):
    """The rows' weighted mean over ``used`` parts, four at a time; read past L1, for other programs wrote them.

    ``first``: where each row's first part lies; the next are ``stride`` rows further.
    """
    acc = tl.zeros([first.shape[0], DIM], tl.float32)
    top = tl.full([first.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([first.shape[0]], tl.float32)
    at_top = partial_top + first
    at_part = partial + first[:, None] * DIM + dim[None, :]
    for split in range(0, used, 4):
        lse_0, part_0 = _part(at_top, at_part, split, stride, used, DIM)
        lse_1, part_1 = _part(at_top, at_part, split + 1, stride, used, DIM)
        lse_2, part_2 = _part(at_top, at_part, split + 2, stride, used, DIM)
        lse_3, part_3 = _part(at_top, at_part, split + 3, stride, used, DIM)
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
def _part(at_top, at_part, split, stride, used, DIM: tl.constexpr):
    """A part's log-sum-exps and means; without weight behind the last."""
    exists = split < used
    lse = tl.load(at_top + split * stride, mask=exists, other=float("-inf"), cache_modifier=".cg")
    part = tl.load(at_part + (split * stride).to(tl.int64) * DIM, mask=exists, other=0.0, cache_modifier=".cg")
    return lse, part


@triton.jit
def store_joined(
    out, partial, partial_top, used, row, token, length, begin, slot, num_kv, kv_head, first_head, head_end,
    out_stride_t, out_stride_h,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Joins ``row``'s parts, from the tile's first ``slot`` on, and stores those rows that exist."""
    dim = tl.arange(0, DIM)
    first = ((slot * num_kv + kv_head) * ROWS + row).to(tl.int64)
    joined = _joined(partial, partial_top, first, num_kv * ROWS, used, dim, DIM)
    head = first_head + row % GROUP
    exists = (row < ROWS // GROUP * GROUP) & (token < length) & (head < head_end)
    out_at = out + ((begin + token).to(tl.int64) * out_stride_t + head * out_stride_h)[:, None] + dim[None, :]
    tl.store(out_at, joined.to(out.dtype.element_ty), mask=exists[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_parts", "num_kv", "min_blocks", "alone_blocks"])
def join(
    out,
    units,
    query_start,
    context_lens,
    head_start,
    partial,
    partial_top,
    num_parts,
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
    HAS_UNITS: tl.constexpr,
):
    """Grid (ROWS / SOME, KV heads, units): joins SOME rows of the parts of ``attend``, by the unit of the first."""
    TOKENS: tl.constexpr = ROWS // GROUP
    follow()
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    seq, tile, part, slot, begin, length, context, per_part = find(
        units, query_start, context_lens, tl.program_id(2), num_parts, min_blocks, HAS_UNITS, BLOCK
    )
    if (seq < 0) | (part > 0):
        return
    _, _, used = extent(tile, length, context, per_part, alone_blocks, TOKENS, BLOCK, HAS_MASKS)
    row = piece * SOME + tl.arange(0, SOME)
    token = tile * TOKENS + row // GROUP
    first_head, head_end = tl.load(head_start + kv_head), tl.load(head_start + kv_head + 1)
    if (used > 1) & (tile * TOKENS + piece * SOME // GROUP < length):
        store_joined(
            out, partial, partial_top, used, row, token, length, begin, slot, num_kv, kv_head, first_head, head_end,
            out_stride_t, out_stride_h, HEAD_DIM, DIM, GROUP, ROWS,
        )  # fmt: skip
