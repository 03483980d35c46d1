"""RMSNorm with the residual's sum before it, in one pass. Knows rows; knows no layers.

As the model does it: the sum is rounded to the rows' type, the norm is taken in float32 and rounded, then the weight
multiplies (Hugging Face's order).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.overlap import OVERLAPPED, follow


@triton.jit
def normed(wide, gain, eps, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """``norm(wide) * gain`` of a row in float32, zeros behind its WIDTH columns; rounded to KIND before the gain."""
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    return (wide * scale).to(KIND) * gain


@triton.jit
def _rms_norm(
    x, residual, weight, out, x_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0)  # cold, and nobody's output: on its way first
    follow()
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        kept = residual + row * WIDTH + column
        total = (wide + tl.load(kept, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(kept, total, mask=inside)
        wide = total.to(tl.float32)
    tl.store(out + row * WIDTH + column, normed(wide, gain, eps, WIDTH, out.dtype.element_ty), mask=inside)


def norm_sizes(width: int) -> tuple[int, int]:
    """Columns and warps of a program that takes a row: the bits of the sum depend on them."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> torch.Tensor:
    """``norm(x) * weight``, ``[T, D]``; with a residual: ``residual += x`` in place, then its norm."""
    assert x_TD.stride(1) == 1 and (residual_TD is None or residual_TD.is_contiguous())
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    rows, width = x_TD.shape
    block, warps = norm_sizes(width)
    has_residual = residual_TD is not None
    _rms_norm[(rows,)](
        x_TD,
        residual_TD if has_residual else x_TD,
        weight_D,
        out,
        x_TD.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        HAS_RESIDUAL=has_residual,
        num_warps=warps,
        **OVERLAPPED,
    )
    return out


def rms_norm_reference(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`rms_norm` in torch."""
    if residual_TD is not None:
        x_TD = residual_TD.add_(x_TD)
    wide = x_TD.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype) * weight_D
