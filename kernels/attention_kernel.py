"""The Triton kernels of paged attention: a tile of query rows against one sequence's keys. Knows no batches, no plans.

A program takes one sequence, one KV head, up to ROWS query rows (tokens x the query heads of that KV head) and a part
of the keys: each key and value is read once for all those rows. Parts of one tile are joined by the program that
ends last (JOIN_LAST), or by ``attention_join.join``. Softmax in float32 and base 2.

Causal by index: query token i of n, in a sequence of L keys, sees keys up to L - n + i. With masks, a row sees every
key before ``window_start`` and key ``window_start + j`` iff bit j of its mask is set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_ray.kernels.attention_join import extent, find, store_joined
from pearl_ray.kernels.overlap import follow


@triton.jit
def _pages(table, start, end, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Page of each key of the block that starts at ``start``, a multiple of BLOCK."""
    inside = tl.arange(0, BLOCK)
    if BLOCK % PAGE == 0:  # no division for each key
        return tl.load(table + start // PAGE + inside // PAGE, mask=start + inside < end, other=0)
    return tl.load(table + (start + inside) // PAGE, mask=start + inside < end, other=0)


@triton.jit
def _rows(page, start, stride_block, stride_slot, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Offset in the cache of each key of the same block."""
    inside = tl.arange(0, BLOCK)
    if BLOCK % PAGE == 0:
        return page.to(tl.int64) * stride_block + inside % PAGE * stride_slot
    return page.to(tl.int64) * stride_block + (start + inside) % PAGE * stride_slot


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
    LATE_SUM: tl.constexpr,
):
    """One block of keys: ``rows_here`` are its rows' offsets in the cache, ``at`` their positions.

    LATE_SUM: ``total`` holds a sum for each column of the blocks; warps then needn't meet to add them up each time.
    """
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
    total = total * shrink[:, None] + weights if LATE_SUM else total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_top, total


# They vary with the batch and the plan: no compilation for each.
@triton.jit(do_not_specialize=["num_kv", "num_parts", "min_blocks", "alone_blocks", "table_stride"])
def attend(
    q,
    k_cache,
    v_cache,
    out,
    tables,
    units,
    query_start,
    context_lens,
    head_start,
    masks,
    window_starts,
    partial,
    partial_top,
    counters,
    scale,
    num_kv,
    num_parts,
    min_blocks,
    alone_blocks,
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
    HAS_MASKS: tl.constexpr,
    JOIN_LAST: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    LATE_SUM: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_UNITS: tl.constexpr,
):
    """Grid (KV heads, units); see ``cut``."""
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    keys, values = k_cache + kv_head.to(tl.int64) * stride_head, v_cache + kv_head.to(tl.int64) * stride_head
    first_head, head_end = tl.load(head_start + kv_head), tl.load(head_start + kv_head + 1)  # nobody's output
    follow()  # before the first return: who comes next waits for this kernel alone
    seq, tile, part, slot, begin, length, context, per_part = find(
        units, query_start, context_lens, tl.program_id(1), num_parts, min_blocks, HAS_UNITS, BLOCK
    )
    if seq < 0:
        return
    old, table = context - length, tables + seq.to(tl.int64) * table_stride
    tile_end, each, used = extent(tile, length, context, per_part, alone_blocks, TOKENS, BLOCK, HAS_MASKS)
    if (length <= 0) | (part >= used):
        return
    first = part * each * BLOCK
    end = tl.minimum(first + each * BLOCK, tile_end)

    # A block's pages are read while the block before it is computed: the pipeline would count a load that another one
    # waits for as a stage of its own, and hold one block of keys where it could hold two.
    page = _pages(table, first, end, BLOCK, PAGE)
    inside = tl.arange(0, BLOCK)

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = tile * TOKENS + row // GROUP
    head = first_head + row % GROUP
    exists = (row < TOKENS * GROUP) & (token < length) & (head < head_end)
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
    total = tl.zeros([ROWS, BLOCK] if LATE_SUM else [ROWS], tl.float32)
    clear_end = first if ONE_LOOP else tl.maximum(tl.minimum(all_see, end) // BLOCK * BLOCK, first)
    if not ONE_LOOP:
        for start in tl.range(first, clear_end, BLOCK, num_stages=STAGES):
            at = start + inside
            rows_here = _rows(page, start, stride_block, stride_slot, BLOCK, PAGE)
            page = _pages(table, start + BLOCK, end, BLOCK, PAGE)
            acc, top, total = _step(
                acc, top, total, q_tile, keys, values, rows_here, at, end, last_seen, mask, window_start, scale,
                HEAD_DIM, DIM, False, HAS_MASKS, LATE_SUM,
            )  # fmt: skip
    for start in tl.range(clear_end, end, BLOCK, num_stages=STAGES if ONE_LOOP else 1):
        at = start + inside
        rows_here = _rows(page, start, stride_block, stride_slot, BLOCK, PAGE)
        page = _pages(table, start + BLOCK, end, BLOCK, PAGE)
        acc, top, total = _step(
            acc, top, total, q_tile, keys, values, rows_here, at, end, last_seen, mask, window_start, scale,
            HEAD_DIM, DIM, True, HAS_MASKS, LATE_SUM,
        )  # fmt: skip

    if LATE_SUM:
        total = tl.sum(total, 1)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out + (where * out_stride_t + head * out_stride_h)[:, None] + dim[None, :]
    if used == 1:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=wanted)
    else:
        at_row = (((slot + part) * num_kv + kv_head) * ROWS + row).to(tl.int64)
        tl.store(partial + at_row[:, None] * DIM + dim[None, :], acc)
        tl.store(partial_top + at_row, top + tl.log2(total))  # log2(0) is -inf: a part that the row sees nothing of
        if JOIN_LAST:
            tl.debug_barrier()  # all threads' stores come before the one that publishes them
            counter = counters + slot * num_kv + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                for piece in range(ROWS // 16):  # four parts of a piece at a time fit the registers
                    some = piece * 16 + tl.arange(0, 16)
                    store_joined(
                        out, partial, partial_top, used, some, tile * TOKENS + some // GROUP, length, begin, slot,
                        num_kv, kv_head, first_head, head_end, out_stride_t, out_stride_h, HEAD_DIM, DIM, GROUP, ROWS,
                    )  # fmt: skip
                tl.store(counter, 0)
