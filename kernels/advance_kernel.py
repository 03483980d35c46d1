"""The Triton kernel of ``kernels.advance``: one program per sequence, and one for the rows that are left over."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.advance import RoundInput, RoundState


# One program for all batches: whatever varies with them is no constant of it.
@triton.jit(do_not_specialize=["num_seqs", "num_padded_seqs", "num_rows"])
def _advance(
    committed,
    newest,
    num_pending,
    pending,
    widths,
    lanes,
    seq_seeds,
    seq_samples,
    seq_temperatures,
    seq_top_ks,
    seq_top_ps,
    seq_min_ps,
    accepted,
    tokens,
    drafted,
    tables,
    token_ids,
    positions,
    slots,
    query_start,
    context_lens,
    tested,
    newest_rows,
    row_seeds,
    row_positions,
    row_samples,
    row_temperatures,
    row_top_ks,
    row_top_ps,
    row_min_ps,
    num_seqs,
    num_padded_seqs,
    num_rows,
    pending_stride,
    drafted_stride,
    table_stride,
    block_size,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDING: tl.constexpr,
):
    me = tl.program_id(0)
    # Verdicts and widths change in no program, so each can tell where everybody's rows begin.
    other = tl.arange(0, SEQS)
    exists = other < num_seqs
    is_replaced = tl.load(tokens + other, mask=exists, other=0) >= 0
    counts = tl.where(is_replaced, 1, tl.load(widths + other, mask=exists, other=1))
    counts = tl.where(exists, counts, 0)
    total = tl.sum(counts, 0)
    if me == num_seqs:
        behind = tl.arange(0, PADDING)  # a name that the other branch doesn't have: types must agree
        left_over = (behind >= total) & (behind < num_rows)
        tl.store(slots + behind, -1, mask=left_over)
        tl.store(tested + behind, -1, mask=left_over)
        tl.store(token_ids + behind, 0, mask=left_over)
        tl.store(positions + behind, 0, mask=left_over)
        beyond = (other >= num_seqs) & (other < num_padded_seqs)
        tl.store(context_lens + other, 0, mask=beyond)
        tl.store(newest_rows + other, (num_rows + other * 0).to(tl.int64), mask=beyond)
        tl.store(query_start + other, total, mask=beyond)
        tl.store(query_start + num_padded_seqs, total)
    else:
        begin = tl.sum(tl.where(other < me, counts, 0), 0)
        token = tl.load(tokens + me)
        width = tl.load(widths + me)
        old_pending = tl.load(num_pending + me)
        first = tl.load(drafted + me * drafted_stride)
        kept = tl.where(token >= 0, 0, width - 1)
        fed = tl.where(token >= 0, token, first)
        length = tl.load(committed + me)
        length += tl.where(token >= 0, tl.load(accepted + me) + 1, old_pending + 1)
        i = tl.arange(0, ROWS)
        in_window = i < kept
        window = tl.load(drafted + me * drafted_stride + 1 + i, mask=in_window, other=-1)
        before = tl.load(drafted + me * drafted_stride + i, mask=(i > 0) & (i <= kept), other=0)
        tl.store(pending + me * pending_stride + i, window, mask=in_window)
        tl.debug_barrier()  # every thread has read what is replaced now
        tl.store(committed + me, length)
        tl.store(newest + me, fed)
        tl.store(num_pending + me, kept)
        tl.store(query_start + me, begin)
        tl.store(context_lens + me, length + kept)
        tl.store(newest_rows + me, tl.where(width > 0, begin + kept, num_rows).to(tl.int64))
        here = i <= kept
        row = begin + i
        position = length - 1 + i
        lane = tl.load(lanes + me).to(tl.int64)
        block = tl.load(tables + lane * table_stride + position // block_size, mask=here, other=0)
        tl.store(token_ids + row, tl.where(i == 0, fed, before), mask=here)
        tl.store(positions + row, position, mask=here)
        tl.store(slots + row, block * block_size + position % block_size, mask=here)
        tl.store(tested + row, window, mask=here)
        same = i * 0
        tl.store(row_seeds + row, tl.load(seq_seeds + me) + same.to(tl.int64), mask=here)
        tl.store(row_positions + row, position + 1, mask=here)
        tl.store(row_samples + row, tl.load(seq_samples + me) + same, mask=here)
        tl.store(row_temperatures + row, tl.load(seq_temperatures + me) + same.to(tl.float32), mask=here)
        tl.store(row_top_ks + row, tl.load(seq_top_ks + me) + same, mask=here)
        tl.store(row_top_ps + row, tl.load(seq_top_ps + me) + same.to(tl.float64), mask=here)
        tl.store(row_min_ps + row, tl.load(seq_min_ps + me) + same.to(tl.float32), mask=here)


def advance(
    state: RoundState,
    accepted: torch.Tensor,
    tokens: torch.Tensor,
    drafted_SW: torch.Tensor,
    tables_LB: torch.Tensor,
    block_size: int,
    following: RoundInput,
) -> None:
    """See ``kernels.advance.advance``. One launch."""
    num_seqs, padded = len(state.committed), len(following.context_lens)
    assert len(following.query_start_S1) == padded + 1 >= num_seqs + 1
    assert state.pending_SW.stride(1) == drafted_SW.stride(1) == tables_LB.stride(1) == 1
    of, to = state.draws, following.draws
    _advance[(num_seqs + 1,)](
        state.committed, state.newest, state.num_pending, state.pending_SW, state.widths, state.lanes,
        of.seeds, of.samples, of.temperatures, of.top_ks, of.top_ps, of.min_ps,
        accepted, tokens, drafted_SW, tables_LB,
        following.token_ids, following.positions, following.slots, following.query_start_S1,
        following.context_lens, following.tested, following.newest_rows,
        to.seeds, to.positions, to.samples, to.temperatures, to.top_ks, to.top_ps, to.min_ps,
        num_seqs, padded, len(following.token_ids),
        state.pending_SW.stride(0), drafted_SW.stride(0), tables_LB.stride(0), block_size,
        SEQS=triton.next_power_of_2(max(padded, len(following.newest_rows)) + 1),
        ROWS=triton.next_power_of_2(max(state.pending_SW.shape[1], drafted_SW.shape[1])),
        PADDING=triton.next_power_of_2(max(len(following.token_ids), len(following.tested) - 1)),
    )  # fmt: skip
