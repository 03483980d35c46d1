"""Linear maps of 1 to 64 rows at the speed of reading the weights: two Triton kernels, or cuBLAS.

``products`` keeps one product per weight in registers and sums at the end: for 1 to 4 rows. ``dots`` uses the matrix
units with rows filled up to 16, 32 or 64 and weights streamed through shared memory; where a map has few outputs, its
inputs are cut into parts, which the program that ends last adds up in their own order, so that a result doesn't depend
on the order in which programs end. ``fixed_linear`` takes any number of rows through one tile shape, so that a row's
bits depend on nothing but the row. Knows shapes; knows no layers.

Shapes: M rows, N outputs, K inputs; weights ``[N, K]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from pearl_ray.kernels.overlap import OVERLAPPED, follow

MAX_ROWS = 64
_FEWEST_ROWS = 16  # of a tile of the matrix units; all rows of a tile of ``fixed_linear``
_MAX_ROWS_OF_PRODUCTS = 4
_SHARED_BYTES = 227 << 10  # of a program, at most (sm_90)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compute a linear map; the blocks are outputs and inputs of one step of a program, splits of inputs."""

    kind: Literal["torch", "products", "dots"]
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    splits: int = 1


TORCH = Choice("torch")
PRODUCTS = (
    Choice("products", 8, 512, 4),
    Choice("products", 4, 512, 2),
    Choice("products", 2, 1024, 4),
    Choice("products", 1, 1024, 2),
)
DOTS = (
    Choice("dots", 16, 256, 4, 4),
    Choice("dots", 16, 512, 4, 3),
    Choice("dots", 32, 256, 4, 4),
    Choice("dots", 64, 128, 4, 4),
    Choice("dots", 64, 128, 4, 6),
    Choice("dots", 128, 64, 4, 5),
    Choice("dots", 128, 128, 8, 3),
    Choice("dots", 64, 256, 4, 3),
)
FIXED = DOTS[2]  # 96 KiB of shared memory
_SPLIT_DOTS = DOTS[3:]
_SPLITS = (2, 3, 4, 6, 8)
_MOST_PROGRAMS = 330  # of a split map: about two and a half for each of an H100's multiprocessors
_FEWEST_STEPS = 3  # of a part


@triton.jit(do_not_specialize=["num_rows"])
def _products(
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
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    here = (n < num_out)[:, None] & (k >= 0)[None, :]
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
    if ROWS == 1:
        y = tl.sum(acc, 1)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)
        tl.store(out + n, y.to(out.dtype.element_ty), mask=n < num_out)
    else:
        y = tl.sum(acc, 2)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
        inside = (m < num_rows)[:, None] & (n < num_out)[None, :]
        tl.store(out + m[:, None] * num_out + n[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # one program for any number of rows
def _dots(
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
):
    """Grid (tiles of ROWS rows, tiles of outputs, parts of the inputs): neighbours share weights."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    clamped = tl.minimum(n, num_out - 1)  # outputs beyond the last are computed and not stored
    w_at = weight + clamped.to(tl.int64)[:, None] * num_in + k[None, :]
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
    inside = (m < num_rows)[:, None] & (n < num_out)[None, :]
    to = out + m.to(tl.int64)[:, None] * num_out + n[None, :]
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
            acc += tl.load(bias + clamped).to(tl.float32)[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


class Scratch:
    """Where the parts of split maps meet. For one stream: maps share it.

    Attributes:
        partial: float32, a tile for each program. counters: int32, zero between launches.
    """

    def __init__(self, device: torch.device) -> None:
        widest = max(choice.block_n for choice in _SPLIT_DOTS)
        self.partial = torch.empty(_MOST_PROGRAMS * MAX_ROWS * widest, dtype=torch.float32, device=device)
        self.counters = torch.zeros(_MOST_PROGRAMS, dtype=torch.int32, device=device)


def candidates(num_rows: int, num_out: int = 0, num_in: int = 0) -> tuple[Choice, ...]:
    """The ways worth measuring for so many rows; split ones too where the map's sizes are given and few."""
    if num_rows > MAX_ROWS:
        return (TORCH,)
    rows = _tile_rows(num_rows)
    dots = [c for c in DOTS if (rows + c.block_n) * c.block_k * 2 * c.stages <= _SHARED_BYTES]
    for choice in [c for c in dots if c in _SPLIT_DOTS]:
        tiles, steps = triton.cdiv(num_out, choice.block_n), num_in // choice.block_k
        fitting = (s for s in _SPLITS if tiles * s <= _MOST_PROGRAMS and steps >= s * _FEWEST_STEPS)
        dots += [replace(choice, splits=splits) for splits in fitting]
    return (TORCH, *(PRODUCTS if num_rows <= _MAX_ROWS_OF_PRODUCTS else ()), *dots)


def _tile_rows(num_rows: int) -> int:
    return max(_FEWEST_ROWS, triton.next_power_of_2(num_rows))


def linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    choice: Choice,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``, ``[M, N]``, summed in float32 and rounded once (cuBLAS: as it does).

    ``scratch``: on the same device; needed for a choice with splits.
    """
    if choice.kind == "torch":
        return F.linear(x_MK, weight_NK, bias_N)
    num_rows = x_MK.shape[0]
    assert num_rows <= MAX_ROWS
    tiles = triton.cdiv(weight_NK.shape[0], choice.block_n)
    if choice.kind == "dots":
        assert choice.splits == 1 or (scratch is not None and tiles * choice.splits <= _MOST_PROGRAMS)
        grid = (1, tiles, choice.splits)
        return _launch_dots(grid, x_MK, weight_NK, bias_N, choice, _tile_rows(num_rows), scratch)
    return _launch(_products, (tiles,), x_MK, weight_NK, bias_N, choice, {"ROWS": triton.next_power_of_2(num_rows)})


def fixed_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """:func:`linear` of any number of rows, 16 at a time, by ``FIXED``: a row's bits don't depend on the others."""
    grid = (triton.cdiv(x_MK.shape[0], _FEWEST_ROWS), triton.cdiv(weight_NK.shape[0], FIXED.block_n))
    return _launch_dots(grid, x_MK, weight_NK, bias_N, FIXED, _FEWEST_ROWS)


def _launch_dots(
    grid: tuple[int, ...],
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    choice: Choice,
    rows: int,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    sizes: dict[str, int | torch.Tensor] = {
        "ROWS": rows,
        "STAGES": choice.stages,
        "EVEN": x_MK.shape[1] % choice.block_k == 0,
    }
    sizes |= {"IS_SPLIT": choice.splits > 1}
    partial, counters = (scratch.partial, scratch.counters) if scratch is not None else (x_MK, x_MK)
    return _launch(_dots, grid, x_MK, weight_NK, bias_N, choice, sizes | {"partial": partial, "counters": counters})


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    choice: Choice,
    more: Mapping[str, int | torch.Tensor],
) -> torch.Tensor:
    num_rows, num_in = x_MK.shape
    num_out = weight_NK.shape[0]
    assert weight_NK.is_contiguous() and x_MK.stride(1) == 1
    out = torch.empty((num_rows, num_out), dtype=x_MK.dtype, device=x_MK.device)
    kernel[grid](
        x_MK,
        weight_NK,
        bias_N if bias_N is not None else x_MK,
        out,
        num_rows=num_rows,
        num_out=num_out,
        num_in=num_in,
        x_stride=x_MK.stride(0),
        **more,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        HAS_BIAS=bias_N is not None,
        num_warps=choice.warps,
        **OVERLAPPED,
    )
    return out
