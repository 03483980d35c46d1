"""The Triton kernels of paged attention: a tile of query rows against one sequence's keys. Knows no batches, no plans.

A program takes one sequence, one KV head, up to ROWS query rows (tokens x the query heads of that KV head) and a part
of the keys: each key and value is read once for all those rows. Parts of one sequence are joined by the program that
ends last (JOIN_LAST), or by ``join`` (Dao et al., flash-decoding). Softmax in float32 and base 2.

Causal by index: query token i of n, in a sequence of L keys, sees keys up to L - n + i. With masks, a row sees every
key before ``window_start`` and key ``window_start + j`` iff bit j of its mask is set.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(
    acc,
    top,
    total,
    q,
    keys,
    values,
    rows_here,
    at,
    end,
    last_seen,
    mask,
    window_start,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """One block of keys: ``rows_here`` are its rows' offsets in the cache, ``at`` their positions."""
    dim = tl.arange(0, DIM)
    offsets = rows_here[:, None] + dim[None, :]
    if MASKED or HEAD_DIM != DIM:
        inside = (at < end)[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0)
        v = tl.load(values + offsets, mask=inside, other=0.0)
    else:
        k = tl.load(keys + offsets)
        v = tl.load(values + offsets)
    scores = tl.dot(q, tl.trans(k)) * scale
    if MASKED:
        if HAS_MASKS:
            bit = at - window_start
            clamped = tl.minimum(tl.maximum(bit, 0), 63).to(tl.int64)
            marked = ((mask[:, None] >> clamped[None, :]) & 1) != 0
            seen = (bit < 0)[None, :] | (marked & (bit < 64)[None, :])
            seen = seen & (at < end)[None, :]
        else:
            seen = (at[None, :] <= last_seen[:, None]) & (at < end)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf; subtracting it from itself would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_top, total


@triton.jit
def _joined(partial, partial_top, unit, num_splits, used, row, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The rows' weighted mean over ``used`` parts; read past L1, for other programs wrote them."""
    acc = tl.zeros([row.shape[0], DIM], tl.float32)
    top = tl.full([row.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([row.shape[0]], tl.float32)
    for split in range(used):
        first = (unit * num_splits + split) * ROWS
        lse = tl.load(partial_top + first + row, cache_modifier=".cg")
        part = tl.load(partial + (first + row).to(tl.int64)[:, None] * DIM + dim[None, :], cache_modifier=".cg")
        new_top = tl.maximum(top, lse)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        top = new_top
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _extent(
    query_start,
    context_lens,
    seq,
    tile,
    num_splits,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """First query row of the sequence, its length, its keys before them, keys of this tile, blocks per part, parts."""
    begin = tl.load(query_start + seq).to(tl.int32)
    length = tl.load(query_start + seq + 1).to(tl.int32) - begin
    context = tl.load(context_lens + seq).to(tl.int32)
    old = context - length
    end = context if HAS_MASKS else old + tl.minimum((tile + 1) * TOKENS, length)
    num_blocks = tl.cdiv(end, BLOCK)
    per_split = tl.maximum(tl.cdiv(num_blocks, num_splits), MIN_BLOCKS)
    return begin, length, old, end, per_split, tl.cdiv(num_blocks, per_split)


@triton.jit(do_not_specialize=["num_splits", "table_stride"])  # they vary with the batch: no compilation for each
def attend(
    q,
    k_cache,
    v_cache,
    out,
    tables,
    query_start,
    context_lens,
    head_start,
    masks,
    window_starts,
    partial,
    partial_top,
    counters,
    scale,
    num_splits,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    stride_block,
    stride_slot,
    stride_head,
    table_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    JOIN_LAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles of a sequence, KV heads x splits, sequences). See ``attention_triton`` for the shapes."""
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, seq = tl.program_id(0), tl.program_id(2)
    kv_head, split = tl.program_id(1) // num_splits, tl.program_id(1) % num_splits
    num_kv = tl.num_programs(1) // num_splits
    begin, length, old, tile_end, per_split, used = _extent(
        query_start, context_lens, seq, tile, num_splits, TOKENS, BLOCK, MIN_BLOCKS, HAS_MASKS
    )
    if (tile * TOKENS >= length) | (split >= used):
        return
    first = split * per_split * BLOCK
    end = tl.minimum(first + per_split * BLOCK, tile_end)

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = tile * TOKENS + row // GROUP
    first_head = tl.load(head_start + kv_head)
    head = first_head + row % GROUP
    exists = (row < TOKENS * GROUP) & (token < length) & (head < tl.load(head_start + kv_head + 1))
    wanted = exists[:, None] & (dim < HEAD_DIM)[None, :]
    where = (begin + token).to(tl.int64)
    q_tile = tl.load(q + (where * q_stride_t + head * q_stride_h)[:, None] + dim[None, :], mask=wanted, other=0.0)
    last_seen = old + token
    mask, window_start = where, old
    if HAS_MASKS:
        mask = tl.load(masks + where, mask=exists, other=0)
        window_start = tl.load(window_starts + seq).to(tl.int32)
    all_see = window_start if HAS_MASKS else old + tile * TOKENS + 1

    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    keys, values = k_cache + kv_head.to(tl.int64) * stride_head, v_cache + kv_head.to(tl.int64) * stride_head
    table = tables + seq.to(tl.int64) * table_stride
    inside = tl.arange(0, BLOCK)
    clear_end = tl.maximum(tl.minimum(all_see, end) // BLOCK * BLOCK, first)
    for start in tl.range(first, clear_end, BLOCK, num_stages=STAGES):
        at = start + inside
        if PAGE % BLOCK == 0:
            page = tl.load(table + start // PAGE).to(tl.int64)
            rows_here = page * stride_block + (start % PAGE + inside) * stride_slot
        else:
            page = tl.load(table + at // PAGE).to(tl.int64)
            rows_here = page * stride_block + (at % PAGE) * stride_slot
        acc, top, total = _step(
            acc, top, total, q_tile, keys, values, rows_here, at, end, last_seen, mask, window_start, scale,
            HEAD_DIM, DIM, False, HAS_MASKS,
        )  # fmt: skip
    for start in tl.range(clear_end, end, BLOCK, num_stages=1):
        at = start + inside
        page = tl.load(table + at // PAGE, mask=at < end, other=0).to(tl.int64)
        rows_here = page * stride_block + (at % PAGE) * stride_slot
        acc, top, total = _step(
            acc, top, total, q_tile, keys, values, rows_here, at, end, last_seen, mask, window_start, scale,
            HEAD_DIM, DIM, True, HAS_MASKS,
        )  # fmt: skip

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out + (where * out_stride_t + head * out_stride_h)[:, None] + dim[None, :]
    if used == 1:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=wanted)
    else:
        unit = (seq * tl.num_programs(0) + tile) * num_kv + kv_head
        at_row = (unit * num_splits + split) * ROWS + row
        tl.store(partial + at_row.to(tl.int64)[:, None] * DIM + dim[None, :], acc)
        tl.store(partial_top + at_row, top + tl.log2(total))  # log2(0) is -inf: a part that the row sees nothing of
        if JOIN_LAST:
            tl.debug_barrier()  # all threads' stores come before the one that publishes them
            if tl.atomic_add(counters + unit, 1, sem="acq_rel") == used - 1:
                joined = _joined(partial, partial_top, unit, num_splits, used, row, dim, ROWS, DIM)
                tl.store(out_at, joined.to(out.dtype.element_ty), mask=wanted)
                tl.store(counters + unit, 0)


@triton.jit(do_not_specialize=["num_splits"])
def join(
    out,
    query_start,
    context_lens,
    head_start,
    partial,
    partial_top,
    num_splits,
    num_kv,
    out_stride_t,
    out_stride_h,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """Grid (tiles of a sequence x ROWS / SOME, KV heads, sequences): joins SOME rows of the parts of ``attend``."""
    TOKENS: tl.constexpr = ROWS // GROUP
    pieces: tl.constexpr = ROWS // SOME
    tile, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    kv_head, seq = tl.program_id(1), tl.program_id(2)
    begin, length, _, _, _, used = _extent(
        query_start, context_lens, seq, tile, num_splits, TOKENS, BLOCK, MIN_BLOCKS, HAS_MASKS
    )
    row, dim = piece * SOME + tl.arange(0, SOME), tl.arange(0, DIM)
    token = tile * TOKENS + row // GROUP
    head = tl.load(head_start + kv_head) + row % GROUP
    exists = (row < TOKENS * GROUP) & (token < length) & (head < tl.load(head_start + kv_head + 1))
    if (used > 1) & (tl.max(exists.to(tl.int32), 0) == 1):
        unit = (seq * (tl.num_programs(0) // pieces) + tile) * num_kv + kv_head
        joined = _joined(partial, partial_top, unit, num_splits, used, row, dim, ROWS, DIM)
        where = (begin + token).to(tl.int64)
        out_at = out + (where * out_stride_t + head * out_stride_h)[:, None] + dim[None, :]
        tl.store(out_at, joined.to(out.dtype.element_ty), mask=exists[:, None] & (dim < HEAD_DIM)[None, :])
