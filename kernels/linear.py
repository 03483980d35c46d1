"""Linear maps of 1 to 64 rows at the speed of reading the weights: two Triton kernels, or cuBLAS.

``products`` keeps one product per weight in registers and sums at the end: for 1 to 4 rows. ``dots`` uses the matrix
units with rows filled up to 16, 32 or 64 and weights streamed through shared memory; where a map has few outputs, its
inputs are cut into parts, which the program that ends last adds up in their own order, so that a result doesn't depend
on the order in which programs end. ``fixed_linear`` takes any number of rows through one tile shape, so that a row's
bits depend on nothing but the row. ``gate_up_silu`` is a map to gates and ups with SiLU·mul behind it, in the same
kernel or in the next. Knows shapes; knows no layers.

Shapes: M rows, N outputs, K inputs; weights ``[N, K]``. I outputs of a gate, and as many of the up projection behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
import triton

from pearl_ray.kernels.activation import silu_mul
from pearl_ray.kernels.linear_kernel import dots, products
from pearl_ray.kernels.overlap import OVERLAPPED

MAX_ROWS = 64
_FEWEST_ROWS = 16  # of a tile of the matrix units; all rows of a tile of ``fixed_linear``
_MAX_ROWS_OF_PRODUCTS = 4
_SHARED_BYTES = 227 << 10  # of a program, at most (sm_90)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to compute a linear map; the blocks are outputs and inputs of one step of a program, splits of inputs.

    ``has_silu``: of gates and ups, and ``silu(gate) * up`` is what comes out; half of a block's outputs are gates then.
    """

    kind: Literal["torch", "products", "dots"]
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    splits: int = 1
    has_silu: bool = False


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


class Scratch:
    """Where the parts of split maps meet. For one stream: maps share it.

    Attributes:
        partial: float32, a tile for each program. counters: int32, zero between launches.
    """

    def __init__(self, device: torch.device) -> None:
        widest = max(choice.block_n for choice in _SPLIT_DOTS)
        self.partial = torch.empty(_MOST_PROGRAMS * MAX_ROWS * widest, dtype=torch.float32, device=device)
        self.counters = torch.zeros(_MOST_PROGRAMS, dtype=torch.int32, device=device)


def candidates(num_rows: int, num_out: int = 0, num_in: int = 0, *, is_gate_up: bool = False) -> tuple[Choice, ...]:
    """The ways worth measuring for so many rows; split ones too where the map's sizes are given and few.

    ``is_gate_up``: SiLU·mul follows; each kernel that isn't split and takes more than one output also with it inside.
    """
    if num_rows > MAX_ROWS:
        return (TORCH,)
    rows = _tile_rows(num_rows)
    tiled = [c for c in DOTS if (rows + c.block_n) * c.block_k * 2 * c.stages <= _SHARED_BYTES]
    for choice in [c for c in tiled if c in _SPLIT_DOTS]:
        tiles, steps = triton.cdiv(num_out, choice.block_n), num_in // choice.block_k
        fitting = (s for s in _SPLITS if tiles * s <= _MOST_PROGRAMS and steps >= s * _FEWEST_STEPS)
        tiled += [replace(choice, splits=splits) for splits in fitting]
    ways = (*(PRODUCTS if num_rows <= _MAX_ROWS_OF_PRODUCTS else ()), *tiled)
    fused = [replace(c, has_silu=True) for c in ways if is_gate_up and c.splits == 1 and c.block_n > 1]
    return (TORCH, *ways, *fused)


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

    A choice with SiLU: of its gates and ups, ``[M, I]``, rounded once.

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
    return _launch(products, (tiles,), x_MK, weight_NK, bias_N, choice, {"ROWS": triton.next_power_of_2(num_rows)})


def gate_up_silu(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    choice: Choice,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """``silu(gate) * up`` ``[M, I]`` of a :func:`linear` map to gates and ups, by one kernel or by two."""
    y = linear(x_MK, weight_NK, bias_N, choice, scratch)
    return y if choice.has_silu else silu_mul(y)


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
    return _launch(dots, grid, x_MK, weight_NK, bias_N, choice, sizes | {"partial": partial, "counters": counters})


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
    assert not choice.has_silu or (num_out % 2 == 0 and choice.block_n > 1 and choice.splits == 1)
    out = torch.empty((num_rows, num_out // 2 if choice.has_silu else num_out), dtype=x_MK.dtype, device=x_MK.device)
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
        SILU=choice.has_silu,
        num_warps=choice.warps,
        **OVERLAPPED,
    )
    return out
