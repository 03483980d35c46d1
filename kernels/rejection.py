"""The end of a round where sequences may follow either rule, without the host: test, accepted length, replacement.

Under the rejection rule a token d drawn from q passes iff u q(d) < p(d), strictly; the first that fails is replaced by
a keyed Gumbel race over log(p - q) on p's whole support, or over log p where no p > q (Leviathan et al., arXiv
2211.17192; ``core.verify`` is the reference). Rows that test nothing, and sequences under the coupled rule, are drawn
as in ``race``. p in float32; u q(d) and p(d) are compared in float64. A row is tested in a program of its own, so that
no sum's order, and no verdict, depends on the rows beside it or on the batch's longest window.

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
_FEWEST_ROWS = 128  # that ``_accept`` is made for: one kernel for the windows that rounds have


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
def _test(
    logits,
    tops,
    best_id,
    sums,
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
    passes,
    normalisers,
    stride,
    num_valid,
    num_blocks,
    PURPOSE: tl.constexpr,
    IS_CUT: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Whether one row's drafted token passes, and the row's normaliser: by the row alone, in one order of sums."""
    row = tl.program_id(0)
    own = tl.load(best_id + row)
    wanted = tl.load(tested + row).to(tl.int32)
    temperature = tl.load(temperatures + row)
    is_same = own == wanted
    passed = is_same.to(tl.int32)
    if tl.load(is_tested + row) != 0:
        p = tl.where(is_same, 1.0, 0.0)
        if temperature > 0.0:
            block = tl.arange(0, CANDIDATES)
            total = tl.sum(tl.load(sums + row * num_blocks + block, mask=block < num_blocks, other=0.0), 0)
            is_known = (wanted >= 0) & (wanted < num_valid)
            x = tl.load(logits + row.to(tl.int64) * stride + wanted, mask=is_known, other=float("-inf")).to(tl.float32)
            if IS_CUT:
                cut = tl.load(cuts + row)
                x = tl.where((x > cut) | ((x == cut) & (wanted <= tl.load(last_ids + row))), x, float("-inf"))
            p = tl.exp((x - tl.load(tops + row)) / temperature) / total
            tl.store(normalisers + row, total)
        entry = row * ENTRIES + tl.arange(0, ENTRIES)
        is_it = tl.load(proposal_ids + entry) == wanted
        q = tl.max(tl.where(is_it, tl.load(proposal_probs + entry), 0.0), 0)
        one = tl.arange(0, 1)
        word = word_at(tl.load(seeds + row), tl.load(positions + row), tl.load(samples + row), PURPOSE, one)
        u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        passed = tl.max((u * q.to(tl.float64) < p.to(tl.float64)).to(tl.int32), 0)
    tl.store(passes + row, passed)


@triton.jit
def _accept(
    row_start,
    best_id,
    passes,
    is_tested,
    temperatures,
    num_accepted,
    next_token,
    failed_row,
    ROWS: tl.constexpr,
):
    """One sequence: how many of its rows pass, and where no race is left to do, its next token."""
    seq = tl.program_id(0)
    begin = tl.load(row_start + seq).to(tl.int32)
    count = tl.load(row_start + seq + 1).to(tl.int32) - begin
    at = tl.arange(0, ROWS)
    passed = tl.load(passes + begin + at, mask=at < count, other=0) != 0
    accepted = tl.minimum(tl.min(tl.where(passed, ROWS, at), 0), count)
    row = begin + accepted
    is_left = accepted < count
    by_race = is_left & (tl.load(is_tested + row, mask=is_left, other=0) != 0)
    by_race = by_race & (tl.load(temperatures + row, mask=is_left, other=0.0) > 0.0)
    tl.store(num_accepted + seq, accepted)
    tl.store(next_token + seq, tl.load(best_id + row, mask=is_left, other=-1).to(tl.int64))
    tl.store(failed_row + seq, tl.where(by_race, row, -1))


@triton.jit
def _residual(
    logits,
    tops,
    failed_row,
    normalisers,
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
        p = tl.exp((x - tl.load(tops + row)) / tl.load(temperatures + row)) / tl.load(normalisers + row)
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
    is_tested = (tested_R >= 0).logical_and_(is_rejection_R)
    # A tested row's race is without noise: it finds the largest logit, and the greedy token.
    heats = draws.temperatures_R.masked_fill(is_tested, 0.0)
    is_tested = is_tested.view(torch.int8)
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
    keys = (draws.seeds_R, draws.positions_R, draws.samples_R, draws.temperatures_R, cuts, last_ids)
    proposals = (proposal_ids_RK, proposal_probs_RK)
    candidates = triton.next_power_of_2(num_blocks)
    passes = torch.empty(rows, dtype=torch.int32, device=device)
    normalisers = torch.empty(rows, dtype=torch.float32, device=device)
    _test[(rows,)](
        logits_RV, tops, own, sums, tested_R, is_tested, *proposals, *keys, passes, normalisers,
        logits_RV.stride(0), valid, num_blocks,
        PURPOSE=_TEST, IS_CUT=is_cut, CANDIDATES=candidates, ENTRIES=NUM_ENTRIES, num_warps=1,
    )  # fmt: skip
    accepted = torch.empty(num_seqs, dtype=torch.int32, device=device)
    token = torch.empty(num_seqs, dtype=torch.int64, device=device)
    failed = torch.empty(num_seqs, dtype=torch.int32, device=device)
    _accept[(num_seqs,)](
        row_start_S1, own, passes, is_tested, draws.temperatures_R, accepted, token, failed,
        ROWS=max(_FEWEST_ROWS, triton.next_power_of_2(max_rows)), num_warps=1,
    )  # fmt: skip
    best2 = torch.empty((num_seqs, 2, num_blocks), dtype=torch.float32, device=device)
    ids2 = torch.empty((num_seqs, 2, num_blocks), dtype=torch.int32, device=device)
    _residual[(num_seqs, num_blocks)](
        logits_RV, tops, failed, normalisers, *proposals, *keys, best2, ids2, logits_RV.stride(0), valid,
        PURPOSE=_RESIDUAL, IS_CUT=is_cut, ENTRIES=NUM_ENTRIES, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    _settle[(num_seqs,)](failed, best2, ids2, token, num_blocks, CANDIDATES=candidates)
    return accepted, token
