"""The Triton kernels of linear maps of 1 to 64 rows: a tile of outputs each. Know neither ways to choose nor launches.

With SILU the map is a gate's and an up projection's, gate rows first, and ``silu(gate) * up`` is stored, ``[M, N / 2]``
and rounded once. The outputs of a program are then gates and ups in turn: a tile costs the registers and the shared
memory that it costs without, and both of a pair end in the same thread.

Shapes: M rows, N outputs, K inputs; weights ``[N, K]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_ray.kernels.activation import silu_times
from pearl_ray.kernels.overlap import follow


@triton.jit
def _weight_row(place, num_out, SILU: tl.constexpr):
    """The row of the weights that the programs take at a place of their order."""
    if SILU:
        return place // 2 + place % 2 * (num_out // 2)
    return place


@triton.jit
def _store(out, y, m, tile, num_rows, num_out, BLOCK_N: tl.constexpr, SILU: tl.constexpr):
    """The tile's outputs ``y`` ``[M, BLOCK_N]`` of rows ``m``."""
    columns: tl.constexpr = BLOCK_N // 2 if SILU else BLOCK_N
    if SILU:
        gate, up = tl.split(tl.reshape(y, [y.shape[0], columns, 2]))
        y = silu_times(gate, up)
        num_out = num_out // 2
    n = tile * columns + tl.arange(0, columns)
    inside = (m < num_rows)[:, None] & (n < num_out)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * num_out + n[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def products(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_out,
    num_in,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = _weight_row(place, num_out, SILU)
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    here = (place < num_out)[:, None] & (k >= 0)[None, :]
    row_of = weight + n.to(tl.int64)[:, None] * num_in
    # The first block of weights, which nobody computes, comes while the kernel before this one ends. Asking for more of
    # them then, up to 32 KiB a program, made this kernel slower (docs/performance.md).
    ahead = tl.load(row_of + k[None, :], mask=here & (k < num_in)[None, :], other=0.0)
    follow()
    shape: tl.constexpr = (BLOCK_N, BLOCK_K) if ROWS == 1 else (ROWS, BLOCK_N, BLOCK_K)
    acc = tl.zeros(shape, tl.float32)
    for start in range(0, num_in, BLOCK_K):
        column = start + k
        w = ahead
        behind = column + BLOCK_K
        ahead = tl.load(row_of + behind[None, :], mask=here & (behind < num_in)[None, :], other=0.0)
        if ROWS == 1:
            part = tl.load(x + column, mask=column < num_in, other=0.0).to(tl.float32)
            acc += w.to(tl.float32) * part[None, :]
        else:
            inside = (m < num_rows)[:, None] & (column < num_in)[None, :]
            part = tl.load(x + m[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += w.to(tl.float32)[None, :, :] * part[:, None, :]
    y = tl.sum(acc, 1)[None, :] if ROWS == 1 else tl.sum(acc, 2)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=place < num_out, other=0.0).to(tl.float32)[None, :]
    _store(out, y, m, tl.program_id(0), num_rows, num_out, BLOCK_N, SILU)


@triton.jit(do_not_specialize=["num_rows"])  # one program for any number of rows
def dots(
    x,
    weight,
    bias,
    out,
    partial,
    counters,
    num_rows,
    num_out,
    num_in,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SILU: tl.constexpr,
):
    """Grid (tiles of ROWS rows, tiles of outputs, parts of the inputs): neighbours share weights."""
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = _weight_row(tl.minimum(place, num_out - 1), num_out, SILU)  # those beyond the last are computed, not stored
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    w_at = weight + n.to(tl.int64)[:, None] * num_in + k[None, :]
    x_at = x + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    follow()
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    begin, end = 0, num_in
    if IS_SPLIT:
        each = tl.cdiv(tl.cdiv(num_in, BLOCK_K), tl.num_programs(2)) * BLOCK_K
        begin = tl.program_id(2) * each
        end = tl.minimum(begin + each, num_in)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(w_at + start)
            part = tl.load(x_at + start)
        else:
            inside = (start + k < num_in)[None, :]
            w = tl.load(w_at + start, mask=inside, other=0.0)
            part = tl.load(x_at + start, mask=inside, other=0.0)
        acc = tl.dot(part, tl.trans(w), acc)
    is_last = True
    if IS_SPLIT:
        num_splits = tl.num_programs(2)
        own = tl.arange(0, ROWS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        at = partial + tl.program_id(1) * num_splits * (ROWS * BLOCK_N) + own
        tl.store(at + tl.program_id(2) * (ROWS * BLOCK_N), acc)
        tl.debug_barrier()  # all threads' stores come before the one that publishes them
        is_last = tl.atomic_add(counters + tl.program_id(1), 1, sem="acq_rel") == num_splits - 1
        if is_last:
            acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for part in range(num_splits):  # in this order, whoever came last; past L1, for others wrote them
                acc += tl.load(at + part * (ROWS * BLOCK_N), cache_modifier=".cg")
            tl.store(counters + tl.program_id(1), 0)
    if is_last:
        if HAS_BIAS:
            acc += tl.load(bias + n).to(tl.float32)[None, :]
        _store(out, acc, m, tl.program_id(1), num_rows, num_out, BLOCK_N, SILU)
