"""SiLU of the gate times the up projection, in one pass, from their joint matrix product. Computes in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.overlap import OVERLAPPED, follow


@triton.jit
def silu_times(gate, up):
    """``silu(gate) * up`` in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_mul(gate_up, out, stride, width, BLOCK: tl.constexpr):
    follow()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, silu_times(gate, up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up_TI: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` ``[T, I]`` of ``[T, 2 I]``, gate first."""
    rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    assert gate_up_TI.stride(1) == 1
    out = torch.empty((rows, width), dtype=gate_up_TI.dtype, device=gate_up_TI.device)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](
        gate_up_TI, out, gate_up_TI.stride(0), width, BLOCK=block, **OVERLAPPED
    )
    return out


def silu_mul_reference(gate_up_TI: torch.Tensor) -> torch.Tensor:
    """:func:`silu_mul` in torch."""
    gate, up = gate_up_TI.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_TI.dtype)
