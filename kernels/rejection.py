"""The end of a round where sequences may follow either rule, without the host: test, accepted length, replacement.

Under the rejection rule a token d drawn from q passes iff u q(d) < p(d), strictly; the first that fails is replaced by
a keyed Gumbel race over log(p - q) on p's whole support, or over log p where no p > q (Leviathan et al., arXiv
2211.17192; ``core.verify`` is the reference). Rows that test nothing, and sequences under the coupled rule, are drawn
as in ``race``. p in float32; u q(d) and p(d) are compared in float64.

Shapes: R rows, V ids (the whole vocabulary), N blocks per row, S sequences, K = 64 entries of a proposal.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from pearl_ray.core.rng import Purpose
from pearl_ray.kernels.noise import block_gumbel, log, word_at
from pearl_ray.kernels.proposal import NUM_ENTRIES
from pearl_ray.kernels.race import BLOCK, Draws, best_candidate, best_of, load_block, race, reduce

_TEST, _RESIDUAL = int(Purpose.TEST), int(Purpose.RESIDUAL)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _sum_block(
    logits,
    tops,
    sums,
    temperatures,
    is_tested,
    cuts,
    last_ids,
    stride,
    num_valid,
    IS_CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each block's part of a tested row's normaliser, relative to the row's largest logit."""
    row, block = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if (tl.load(is_tested + row) != 0) & (temperature > 0.0):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = load_block(logits, row, stride, ids, 0, num_valid, num_valid, cuts, last_ids, IS_CUT)
        part = tl.sum(tl.exp((x - tl.load(tops + row)) / temperature), 0)
        tl.store(sums + row * tl.num_programs(1) + block, part)


@triton.jit
def _accept(
    logits,
    tops,
    best_id,
    sums,
    row_start,
    tested,
    is_tested,
    proposal_ids,
    proposal_probs,
    seeds,
    positions,
    samples,
    temperatures,
    cuts,
    last_ids,
    num_accepted,
    next_token,
    failed_row,
    normaliser,
    stride,
    num_valid,
    num_blocks,
    PURPOSE: tl.constexpr,
    IS_CUT: tl.constexpr,
    ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One sequence: which of its rows pass, and where none is left to do, its next token."""
    seq = tl.program_id(0)
    begin = tl.load(row_start + seq).to(tl.int32)
    count = tl.load(row_start + seq + 1).to(tl.int32) - begin
    at = tl.arange(0, ROWS)
    exists = at < count
    row = begin + at
    own = tl.load(best_id + row, mask=exists, other=-1)
    wanted = tl.load(tested + row, mask=exists, other=-1).to(tl.int32)
    by_test = (tl.load(is_tested + row, mask=exists, other=0) != 0) & exists
    temperature = tl.load(temperatures + row, mask=exists, other=0.0)

    block, entry = tl.arange(0, CANDIDATES), tl.arange(0, ENTRIES)
    hot = by_test & (temperature > 0.0)
    here = hot[:, None] & (block < num_blocks)[None, :]
    total = tl.sum(tl.load(sums + row[:, None] * num_blocks + block[None, :], mask=here, other=0.0), 1)
    is_known = hot & (wanted >= 0) & (wanted < num_valid)
    x = tl.load(logits + row.to(tl.int64) * stride + wanted, mask=is_known, other=float("-inf")).to(tl.float32)
    if IS_CUT:
        cut = tl.load(cuts + row, mask=exists, other=0.0)
        last = tl.load(last_ids + row, mask=exists, other=0)
        x = tl.where((x > cut) | ((x == cut) & (wanted <= last)), x, float("-inf"))
    top = tl.load(tops + row, mask=exists, other=0.0)
    p = tl.exp((x - top) / tl.where(hot, temperature, 1.0)) / tl.where(hot, total, 1.0)
    p = tl.where(hot, p, tl.where(wanted == own, 1.0, 0.0))
    slot = row[:, None] * ENTRIES + entry[None, :]
    is_entry = by_test[:, None] & (entry >= 0)[None, :]
    ids = tl.load(proposal_ids + slot, mask=is_entry, other=-1)
    probs = tl.load(proposal_probs + slot, mask=is_entry, other=0.0)
    q = tl.max(tl.where(ids == wanted[:, None], probs, 0.0), 1)
    seed = tl.load(seeds + row, mask=exists, other=0)
    position, sample = tl.load(positions + row, mask=exists, other=0), tl.load(samples + row, mask=exists, other=0)
    word = word_at(seed, position, sample, PURPOSE, at * 0)
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    passes = tl.where(by_test, u * q.to(tl.float64) < p.to(tl.float64), own == wanted) & exists

    accepted = tl.minimum(tl.min(tl.where(passes, ROWS, at), 0), count)
    is_it = at == accepted
    needs_race = tl.max((is_it & hot).to(tl.int32), 0) == 1
    chosen = tl.sum(tl.where(is_it, own, 0), 0)
    tl.store(num_accepted + seq, accepted)
    tl.store(next_token + seq, tl.where(accepted < count, chosen, -1).to(tl.int64))
    tl.store(failed_row + seq, tl.where(needs_race, begin + accepted, -1))
    tl.store(normaliser + seq, tl.sum(tl.where(is_it, total, 0.0), 0))


@triton.jit
def _residual(
    logits,
    tops,
    failed_row,
    normaliser,
    proposal_ids,
    proposal_probs,
    seeds,
    positions,
    samples,
    temperatures,
    cuts,
    last_ids,
    best,
    best_id,
    stride,
    num_valid,
    PURPOSE: tl.constexpr,
    IS_CUT: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two races over one block of each failed row: candidates of max(p - q, 0), then of p."""
    seq, block, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.load(failed_row + seq)
    if row >= 0:
        first = block * BLOCK
        ids = first + tl.arange(0, BLOCK)
        x = load_block(logits, row, stride, ids, 0, num_valid, num_valid, cuts, last_ids, IS_CUT)
        p = tl.exp((x - tl.load(tops + row)) / tl.load(temperatures + row)) / tl.load(normaliser + seq)
        rest = p
        for entry in range(ENTRIES):
            proposed = tl.load(proposal_ids + row * ENTRIES + entry)
            if (proposed >= first) & (proposed < first + BLOCK):
                q = tl.load(proposal_probs + row * ENTRIES + entry)
                rest = tl.where(ids == proposed, rest - q, rest)
        noise = block_gumbel(
            tl.load(seeds + row), tl.load(positions + row), tl.load(samples + row), PURPOSE, first, BLOCK
        )
        score = tl.where(rest > 0.0, log(tl.maximum(rest, _TINY)) + noise, float("-inf"))
        top, token = best_of(score, ids)
        at = seq * 2 * num_blocks + block
        tl.store(best + at, top)
        tl.store(best_id + at, token)
        score = tl.where(p > 0.0, log(tl.maximum(p, _TINY)) + noise, float("-inf"))
        top, token = best_of(score, ids)
        tl.store(best + at + num_blocks, top)
        tl.store(best_id + at + num_blocks, token)


@triton.jit
def _settle(failed_row, best, best_id, next_token, num_blocks, CANDIDATES: tl.constexpr):
    seq = tl.program_id(0)
    if tl.load(failed_row + seq) >= 0:
        pair = seq * 2 + tl.arange(0, 2)
        score, token = best_candidate(best, best_id, pair, pair >= 0, num_blocks, CANDIDATES)
        first = tl.arange(0, 2) == 0
        is_residual = tl.max(tl.where(first, score, float("-inf")), 0) > float("-inf")
        chosen = tl.sum(tl.where(first == is_residual, token, 0), 0)
        tl.store(next_token + seq, chosen.to(tl.int64))


def verify(
    logits_RV: torch.Tensor,
    draws: Draws,
    row_start_S1: torch.Tensor,
    tested_R: torch.Tensor,
    is_rejection_R: torch.Tensor,
    proposal_ids_RK: torch.Tensor,
    proposal_probs_RK: torch.Tensor,
    max_rows: int,
    *,
    num_valid: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verdicts as ``race.judge`` gives them, accepted int32 ``[S]`` and next token int64 ``[S]``, of mixed rules.

    Args:
        draws: the target's temperatures, and cuts where there are filters.
        tested_R: the drafted token that the row tests; -1 on a row that tests none (it's drawn as `coupled`).
        is_rejection_R: bool, the rule of the row's sequence.
        proposal_ids_RK, proposal_probs_RK: int32 and float32 ``[R, 64]``; read on tested rejection rows only.
    """
    rows, size = logits_RV.shape
    num_seqs, device = len(row_start_S1) - 1, logits_RV.device
    valid = size if num_valid is None else min(size, num_valid)
    assert proposal_ids_RK.shape == proposal_probs_RK.shape == (rows, NUM_ENTRIES)
    is_tested = (is_rejection_R & (tested_R >= 0)).to(torch.int32)
    # A tested row's race is without noise: it finds the largest logit, and the greedy token.
    heats = draws.temperatures_R.masked_fill(is_tested != 0, 0.0)
    best, ids = race(logits_RV, dataclasses.replace(draws, temperatures_R=heats), num_valid=valid)
    num_blocks = best.shape[1]
    tops, own = reduce(best, ids)
    sums = torch.empty((rows, num_blocks), dtype=torch.float32, device=device)
    is_cut = draws.cuts_R is not None
    cuts, last_ids = (draws.cuts_R, draws.last_ids_R) if is_cut else (tops, own)
    grid = (rows, num_blocks)
    _sum_block[grid](
        logits_RV, tops, sums, draws.temperatures_R, is_tested, cuts, last_ids, logits_RV.stride(0), valid,
        IS_CUT=is_cut, BLOCK=BLOCK,
    )  # fmt: skip
    accepted = torch.empty(num_seqs, dtype=torch.int32, device=device)
    token = torch.empty(num_seqs, dtype=torch.int64, device=device)
    failed = torch.empty(num_seqs, dtype=torch.int32, device=device)
    normaliser = torch.empty(num_seqs, dtype=torch.float32, device=device)
    keys = (draws.seeds_R, draws.positions_R, draws.samples_R, draws.temperatures_R, cuts, last_ids)
    proposals = (proposal_ids_RK, proposal_probs_RK)
    candidates = triton.next_power_of_2(num_blocks)
    _accept[(num_seqs,)](
        logits_RV, tops, own, sums, row_start_S1, tested_R, is_tested, *proposals, *keys,
        accepted, token, failed, normaliser, logits_RV.stride(0), valid, num_blocks,
        PURPOSE=_TEST, IS_CUT=is_cut, ROWS=triton.next_power_of_2(max_rows), CANDIDATES=candidates,
        ENTRIES=NUM_ENTRIES,
    )  # fmt: skip
    best2 = torch.empty((num_seqs, 2, num_blocks), dtype=torch.float32, device=device)
    ids2 = torch.empty((num_seqs, 2, num_blocks), dtype=torch.int32, device=device)
    _residual[(num_seqs, num_blocks)](
        logits_RV, tops, failed, normaliser, *proposals, *keys, best2, ids2, logits_RV.stride(0), valid,
        PURPOSE=_RESIDUAL, IS_CUT=is_cut, ENTRIES=NUM_ENTRIES, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    _settle[(num_seqs,)](failed, best2, ids2, token, num_blocks, CANDIDATES=candidates)
    return accepted, token
