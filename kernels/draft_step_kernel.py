"""The Triton kernel of ``kernels.draft_step``: one program for all sequences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.draft_step import StepState
from pearl_ray.kernels.overlap import OVERLAPPED, follow


@triton.jit(do_not_specialize=["num_seqs"])  # a compilation for each power of two, not for 13 and for 16
def _feed(
    token_ids,
    positions,
    slots,
    context_lens,
    limits,
    lanes,
    step_at,
    window,
    draw_positions,
    drawn,
    tables,
    num_seqs,
    window_stride,
    table_stride,
    block_size,
    SEQS: tl.constexpr,
):
    follow()
    seq = tl.arange(0, SEQS)
    exists = seq < num_seqs
    step = tl.load(step_at)
    token = tl.load(drawn + seq, mask=exists, other=0)
    goes_on = step + 1 < tl.load(limits + seq, mask=exists, other=0)
    position = tl.load(positions + seq, mask=exists, other=0) + goes_on.to(tl.int32)
    lane = tl.load(lanes + seq, mask=exists, other=0).to(tl.int64)
    block = tl.load(tables + lane * table_stride + position // block_size, mask=exists & goes_on, other=0)
    draw_position = tl.load(draw_positions + seq, mask=exists, other=0)
    tl.debug_barrier()  # every thread has read what is replaced now
    tl.store(window + step * window_stride + seq, token, mask=exists)
    tl.store(token_ids + seq, token, mask=exists)
    tl.store(positions + seq, position, mask=exists)
    tl.store(slots + seq, tl.where(goes_on, block * block_size + position % block_size, -1), mask=exists)
    tl.store(context_lens + seq, position + 1, mask=exists)
    tl.store(draw_positions + seq, draw_position + 1, mask=exists)
    tl.store(step_at, step + 1)


def feed(state: StepState, tokens: torch.Tensor, tables_LB: torch.Tensor, block_size: int) -> None:
    """See ``kernels.draft_step.feed``. One launch."""
    num_seqs = len(state.token_ids)
    _feed[(1,)](
        state.token_ids, state.positions, state.slots, state.context_lens, state.limits, state.lanes, state.step_1,
        state.window_WS, state.draws.positions, tokens, tables_LB, num_seqs, state.window_WS.stride(0),
        tables_LB.stride(0), block_size, SEQS=triton.next_power_of_2(num_seqs), **OVERLAPPED,
    )  # fmt: skip
