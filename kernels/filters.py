"""Top-k, top-p and min-p on the device: where each row's ranking is cut. Knows scores; draws nothing.

Tokens are ranked by (logit descending, id ascending), as in ``core.logits``, and every filter keeps a beginning of that
ranking; so all of them together are one cut: a logit, and the last id that is kept among those that equal it. It is found
without sorting: 8 passes over the row, each settling 4 bits of the logit's ordered bit pattern by the number and the mass
of the tokens above each of 16 values. Masses are integers (units of 2^-40 of the largest), so sums don't depend on
their order, and a row's cut not on the batch.

Shapes: R rows, V ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.race import BLOCK

_UNIT = tl.constexpr(float(2**40))
_LOG2E = tl.constexpr(1.4426950408889634)
_ANY_ID = tl.constexpr(2**31 - 1)
_DIGITS = 8


@triton.jit
def key_of(x):
    """uint32 that orders as the floats do; -0 and 0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def value_of(key):
    """The float of a key."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(logits, row, stride, ids, num_valid):
    return tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < num_valid, other=float("-inf")).to(tl.float32)


@triton.jit
def _block_max(logits, tops, stride, num_valid, BLOCK: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    top = tl.max(_load(logits, row, stride, ids, num_valid), 0)
    tl.store(tops + row * tl.num_programs(1) + block, top)


@triton.jit
def row_max(tops, row, num_blocks, CANDIDATES: tl.constexpr):
    """The row's largest logit from its blocks'."""
    at = tl.arange(0, CANDIDATES)
    return tl.max(tl.load(tops + row * num_blocks + at, mask=at < num_blocks, other=float("-inf")), 0)


@triton.jit
def _descend(counts, masses, row, row_step, pass_step, limit, share, given_total, PASSES: tl.constexpr):
    """The digits that the passes so far settle: (key, count and mass above it, the row's bound on the mass)."""
    digit = tl.arange(0, 16)
    key = tl.full((), 0, tl.uint32)
    count_above, mass_above = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    bound = tl.full((), float("inf"), tl.float64)
    for step in tl.static_range(PASSES):
        at = step * pass_step + row * row_step + digit
        count, mass = tl.load(counts + at), tl.load(masses + at)
        if step == 0:
            total = tl.where(given_total >= 0, given_total, tl.sum(mass, 0))
            bound = tl.where(share < 1.0, share * total.to(tl.float64), bound)
        # How much lies above each digit: all of the larger ones, and what lay above before.
        larger = digit[None, :] > digit[:, None]
        count_over = count_above + tl.sum(tl.where(larger, count[None, :], 0), 1)
        mass_over = mass_above + tl.sum(tl.where(larger, mass[None, :], 0), 1)
        is_kept = (count_over < limit) & (mass_over.to(tl.float64) < bound)
        chosen = tl.min(tl.where(is_kept, digit, 15), 0)
        count_above = tl.sum(tl.where(digit == chosen, count_over, 0), 0)
        mass_above = tl.sum(tl.where(digit == chosen, mass_over, 0), 0)
        key = (key << 4) | chosen.to(tl.uint32)
    return key, count_above, mass_above, bound


@triton.jit
def _pass(
    logits,
    tops,
    counts,
    masses,
    temperatures,
    limits,
    shares,
    totals,
    stride,
    num_valid,
    num_blocks,
    row_step,
    pass_step,
    PASS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    limit, share = tl.load(limits + row).to(tl.int64), tl.load(shares + row)
    temperature = tl.load(temperatures + row)
    if (temperature > 0.0) & ((limit < num_valid) | (share < 1.0)):
        total = tl.load(totals + row) if HAS_TOTALS else tl.full((), -1, tl.int64)
        prefix, _, _, _ = _descend(counts, masses, row, row_step, pass_step, limit, share, total, PASS)
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = _load(logits, row, stride, ids, num_valid)
        key = key_of(x)
        matches = ids < num_valid
        if PASS > 0:
            matches = matches & ((key >> (32 - 4 * PASS)) == prefix)
        if tl.max(matches.to(tl.int32), 0) == 1:
            digit = ((key >> (28 - 4 * PASS)) & 15).to(tl.int32)
            top = row_max(tops, row, num_blocks, CANDIDATES)
            mass = (tl.exp2((x - top) * (_LOG2E / temperature)) * _UNIT).to(tl.int64)
            at = PASS * pass_step + row * row_step
            for value in tl.static_range(16):
                mine = matches & (digit == value)
                count = tl.sum(mine.to(tl.int32), 0)
                if count > 0:
                    tl.atomic_add(counts + at + value, count.to(tl.int64))
                    tl.atomic_add(masses + at + value, tl.sum(tl.where(mine, mass, 0), 0))


@triton.jit
def _finish(
    logits,
    tops,
    counts,
    masses,
    temperatures,
    limits,
    shares,
    min_ps,
    totals,
    kept_masses,
    cuts,
    last_ids,
    stride,
    num_valid,
    num_blocks,
    row_step,
    pass_step,
    HAS_TOTALS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    limit, share = tl.load(limits + row).to(tl.int64), tl.load(shares + row)
    temperature, min_p = tl.load(temperatures + row), tl.load(min_ps + row)
    cut, last = tl.full((), float("-inf"), tl.float32), tl.full((), _ANY_ID, tl.int32)
    kept = tl.full((), -1, tl.int64)
    if (temperature > 0.0) & ((limit < num_valid) | (share < 1.0)):
        total = tl.load(totals + row) if HAS_TOTALS else tl.full((), -1, tl.int64)
        key, above, mass_above, bound = _descend(counts, masses, row, row_step, pass_step, limit, share, total, 8)
        cut = value_of(key)
        at = 7 * pass_step + row * row_step + (key & 15).to(tl.int32)
        ties = tl.load(counts + at)
        each = tl.load(masses + at) // tl.maximum(ties, 1)
        room = tl.minimum(ties, limit - above)
        if share < 1.0:
            left = tl.ceil((bound - mass_above.to(tl.float64)) / tl.maximum(each, 1).to(tl.float64))
            room = tl.minimum(room, tl.maximum(left, 1.0).to(tl.int64))
        kept = tl.where(share < 1.0, -1, mass_above + room * each)  # the second search's total: top-k's alone
        if room < ties:  # the room-th of the ids whose logit is the cut
            found = tl.full((), 0, tl.int64)
            start = tl.full((), 0, tl.int32)
            while (found < room) & (start < num_valid):
                ids = start + tl.arange(0, BLOCK)
                x = _load(logits, row, stride, ids, num_valid)
                tied = (key_of(x) == key) & (ids < num_valid)
                here = tl.sum(tied.to(tl.int32), 0).to(tl.int64)
                if found + here >= room:
                    rank = found + tl.cumsum(tied.to(tl.int32), 0)
                    last = tl.min(tl.where(tied & (rank == room), ids, _ANY_ID), 0)
                found += here
                start += BLOCK
    if (temperature > 0.0) & (min_p > 0.0):
        floor = row_max(tops, row, num_blocks, CANDIDATES) + temperature * tl.log(min_p)
        if floor > cut:
            cut, last = floor, tl.full((), _ANY_ID, tl.int32)
    tl.store(cuts + row, cut)
    tl.store(last_ids + row, last)
    tl.store(kept_masses + row, kept)


def find_cuts(
    logits_RV: torch.Tensor,
    temperatures_R: torch.Tensor,
    top_ks_R: torch.Tensor,
    top_ps_R: torch.Tensor,
    min_ps_R: torch.Tensor,
    *,
    num_valid: int | None = None,
    has_both: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(cuts_R, last_ids_R)``: a token is kept iff its logit is above the cut, or equals it and its id is up to that.

    Rows without filters, and greedy ones, get (-inf, any id). Needs the whole vocabulary; no host, so it can be captured.

    Args:
        temperatures_R: float32. top_ks_R: int32, 0 keeps all. top_ps_R: float64. min_ps_R: float32, 0 keeps all.
        has_both: whether any row has both top-k and top-p, which takes a second search.
    """
    rows, size = logits_RV.shape
    valid = size if num_valid is None else min(size, num_valid)
    assert logits_RV.stride(1) == 1 and top_ps_R.dtype == torch.float64
    num_blocks, device = triton.cdiv(valid, BLOCK), logits_RV.device
    tops = torch.empty((rows, num_blocks), dtype=torch.float32, device=device)
    _block_max[(rows, num_blocks)](logits_RV, tops, logits_RV.stride(0), valid, BLOCK=BLOCK)
    cuts = torch.empty(rows, dtype=torch.float32, device=device)
    last_ids = torch.empty(rows, dtype=torch.int32, device=device)
    totals = torch.empty(rows, dtype=torch.int64, device=device)
    is_limited = (top_ks_R > 0) & (top_ks_R < valid)
    limits_R = torch.where(is_limited, top_ks_R.long(), valid)
    all_R = torch.ones_like(top_ps_R)
    searches = [torch.where(is_limited, all_R, top_ps_R), top_ps_R] if has_both else [top_ps_R]
    for number, shares_R in enumerate(searches):
        # counts and masses [2, passes, R, 16]
        sums = torch.zeros((2, _DIGITS, rows, 16), dtype=torch.int64, device=device)
        common = (logits_RV.stride(0), valid, num_blocks, 16, rows * 16)
        shape = {"HAS_TOTALS": number > 0, "CANDIDATES": triton.next_power_of_2(num_blocks), "BLOCK": BLOCK}
        inputs = (logits_RV, tops, sums[0], sums[1], temperatures_R, limits_R, shares_R)
        for step in range(_DIGITS):
            _pass[(rows, num_blocks)](*inputs, totals, *common, **shape, PASS=step)
        _finish[(rows,)](*inputs, min_ps_R, totals, totals, cuts, last_ids, *common, **shape)
    return cuts, last_ids
