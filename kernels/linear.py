"""Linear maps of 1 to 64 rows at the speed of reading the weights: two Triton kernels, or cuBLAS.

``products`` keeps one product per weight in registers and sums at the end: for 1 to 4 rows. ``dots`` uses the matrix
units with rows filled up to 16, 32 or 64 and weights streamed through shared memory. No split over the inner dimension,
so a result doesn't depend on the order in which programs end. ``fixed_linear`` takes any number of rows through one
tile shape, so that a row's bits depend on nothing but the row. Knows shapes; knows no layers.

Shapes: M rows, N outputs, K inputs; weights ``[N, K]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """One way to compute a linear map; the blocks are outputs and inputs of one step of a program."""

    kind: Literal["torch", "products", "dots"]
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1


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
)
FIXED = DOTS[2]  # 96 KiB of shared memory


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
):
    """Grid (tiles of ROWS rows, tiles of outputs): neighbours share weights."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    clamped = tl.minimum(n, num_out - 1)  # outputs beyond the last are computed and not stored
    w_at = weight + clamped.to(tl.int64)[:, None] * num_in + k[None, :]
    x_at = x + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    follow()
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in tl.range(0, num_in, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(w_at + start)
            part = tl.load(x_at + start)
        else:
            inside = (start + k < num_in)[None, :]
            w = tl.load(w_at + start, mask=inside, other=0.0)
            part = tl.load(x_at + start, mask=inside, other=0.0)
        acc = tl.dot(part, tl.trans(w), acc)
    if HAS_BIAS:
        acc += tl.load(bias + clamped).to(tl.float32)[None, :]
    inside = (m < num_rows)[:, None] & (n < num_out)[None, :]
    to = out + m.to(tl.int64)[:, None] * num_out + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


def candidates(num_rows: int) -> tuple[Choice, ...]:
    """The ways worth measuring for so many rows."""
    if num_rows > MAX_ROWS:
        return (TORCH,)
    rows = _tile_rows(num_rows)
    dots = (c for c in DOTS if (rows + c.block_n) * c.block_k * 2 * c.stages <= _SHARED_BYTES)
    return (TORCH, *(PRODUCTS if num_rows <= _MAX_ROWS_OF_PRODUCTS else ()), *dots)


def _tile_rows(num_rows: int) -> int:
    return max(_FEWEST_ROWS, triton.next_power_of_2(num_rows))


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, choice: Choice) -> torch.Tensor:
    """``x @ weight.T + bias``, ``[M, N]``, summed in float32 and rounded once (cuBLAS: as it does)."""
    if choice.kind == "torch":
        return F.linear(x_MK, weight_NK, bias_N)
    num_rows = x_MK.shape[0]
    assert num_rows <= MAX_ROWS
    tiles = (triton.cdiv(weight_NK.shape[0], choice.block_n),)
    if choice.kind == "dots":
        return _launch_dots((1, *tiles), x_MK, weight_NK, bias_N, choice, _tile_rows(num_rows))
    return _launch(_products, tiles, x_MK, weight_NK, bias_N, choice, {"ROWS": triton.next_power_of_2(num_rows)})


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
) -> torch.Tensor:
    sizes = {"ROWS": rows, "STAGES": choice.stages, "EVEN": x_MK.shape[1] % choice.block_k == 0}
    return _launch(_dots, grid, x_MK, weight_NK, bias_N, choice, sizes)


def _launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    choice: Choice,
    sizes: Mapping[str, int],
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
        num_rows,
        num_out,
        num_in,
        x_MK.stride(0),
        **sizes,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        HAS_BIAS=bias_N is not None,
        num_warps=choice.warps,
        **OVERLAPPED,
    )
    return out
