"""Top-k, top-p and min-p on the device: where each row's ranking is cut. Knows scores; draws nothing.

Tokens are ranked by (logit descending, id ascending), as in ``core.logits``, and every filter keeps a beginning of that
ranking; so all of them together are one cut: a logit, and the last id kept among those that equal it. It is found
without sorting: 8 passes over the row, each settling 4 bits of the logit's ordered bit pattern by the number and the
mass of the tokens above each of 16 values. Masses are integers (units of 2^-39 of the largest), so sums don't depend on
their order, and a row's cut not on the batch.

Shapes: R rows, V ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.race import BLOCK

_UNIT = tl.constexpr(float(2**39))
_COUNT_BIT = tl.constexpr(51)  # a block's mass is below 2^51: its number of tokens fits above, in the same word
_LOG2E = tl.constexpr(1.4426950408889634)
_ANY_ID = tl.constexpr(2**31 - 1)
_PASSES = 8


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
def _step(states, sums, row, limit, share, given_total, num_rows, PASS: tl.constexpr):
    """The search's state after PASS passes: (key, count and mass above it, the row's bound on the mass, ties).

    ``states`` ``[passes, R, 4]`` holds what the pass before found, ``sums`` ``[passes, R, 2, 16]`` what it counted.
    """
    digit = tl.arange(0, 16)
    key, count_above, mass_above = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    bound_unit = tl.full((), 0, tl.int64)
    ties = tl.full((), 0, tl.int64)
    if PASS > 0:
        at = sums + ((PASS - 1) * num_rows + row) * 32 + digit
        count, mass = tl.load(at), tl.load(at + 16)
        bound_unit = tl.where(given_total >= 0, given_total, tl.sum(mass, 0))
        if PASS > 1:
            at = states + ((PASS - 1) * num_rows + row) * 4
            key, count_above = tl.load(at), tl.load(at + 1)
            mass_above, bound_unit = tl.load(at + 2), tl.load(at + 3)
        bound = tl.where(share < 1.0, share * bound_unit.to(tl.float64), float("inf"))
        # How much lies above each digit: all of the larger ones, and what lay above before.
        count_over = count_above + tl.sum(count, 0) - tl.cumsum(count, 0)
        mass_over = mass_above + tl.sum(mass, 0) - tl.cumsum(mass, 0)
        is_kept = (count_over < limit) & (mass_over.to(tl.float64) < bound)
        chosen = tl.min(tl.where(is_kept, digit, 15), 0)
        count_above = tl.sum(tl.where(digit == chosen, count_over, 0), 0)
        mass_above = tl.sum(tl.where(digit == chosen, mass_over, 0), 0)
        ties = tl.sum(tl.where(digit == chosen, count, 0), 0)
        key = (key << 4) | chosen.to(tl.int64)
    return key, count_above, mass_above, bound_unit, ties


@triton.jit(do_not_specialize=["num_rows"])
def _pass(
    logits,
    tops,
    states,
    sums,
    temperatures,
    limits,
    shares,
    totals,
    block_ties,
    stride,
    num_valid,
    num_blocks,
    num_rows,
    PASS: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts 16 digits of the keys that match so far; the last pass, of 9, counts each block's ties."""
    row, block = tl.program_id(0), tl.program_id(1)
    limit, share = tl.load(limits + row).to(tl.int64), tl.load(shares + row)
    temperature = tl.load(temperatures + row)
    if (temperature > 0.0) & ((limit < num_valid) | (share < 1.0)):
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = _load(logits, row, stride, ids, num_valid)
        top = row_max(tops, row, num_blocks, CANDIDATES)
        total = tl.load(totals + row) if HAS_TOTALS else tl.full((), -1, tl.int64)
        prefix, count, mass, unit, _ = _step(states, sums, row, limit, share, total, num_rows, PASS)
        if (PASS > 0) & (block == 0):
            at = states + (PASS * num_rows + row) * 4
            tl.store(at, prefix)
            tl.store(at + 1, count)
            tl.store(at + 2, mass)
            tl.store(at + 3, unit)
        key = key_of(x).to(tl.int64)
        matches = ids < num_valid
        if PASS > 0:
            matches = matches & ((key >> (32 - 4 * PASS)) == prefix)
        if PASS == 8:
            tl.store(block_ties + row * num_blocks + block, tl.sum(matches.to(tl.int32), 0))
        elif tl.max(matches.to(tl.int32), 0) == 1:
            digit = ((key >> (28 - 4 * PASS)) & 15).to(tl.int32)
            weight = (tl.exp2((x - top) * (_LOG2E / temperature)) * _UNIT).to(tl.int64)
            # Number and mass in one word: half the sums.
            packed = tl.where(matches, weight + (tl.full((), 1, tl.int64) << _COUNT_BIT), 0)
            value = tl.arange(0, 16)
            sixteen = tl.zeros([16], tl.int64)
            for one in tl.static_range(16):
                part = tl.sum(tl.where(digit == one, packed, 0), 0)
                sixteen = tl.where(value == one, part, sixteen)
            sums_at = sums + (PASS * num_rows + row) * 32 + value
            counted = sixteen >> _COUNT_BIT
            tl.atomic_add(sums_at, counted, mask=counted != 0)
            tl.atomic_add(sums_at + 16, sixteen - (counted << _COUNT_BIT), mask=counted != 0)


@triton.jit(do_not_specialize=["num_rows"])
def _finish(
    logits,
    tops,
    states,
    sums,
    temperatures,
    limits,
    shares,
    totals,
    block_ties,
    min_ps,
    cuts,
    last_ids,
    stride,
    num_valid,
    num_blocks,
    num_rows,
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
        key, above, mass_above, unit, ties = _step(states, sums, row, limit, share, total, num_rows, 8)
        cut = value_of(key.to(tl.uint32))
        top = row_max(tops, row, num_blocks, CANDIDATES)
        each = (tl.exp2((cut - top) * (_LOG2E / temperature)) * _UNIT).to(tl.int64)
        room = tl.minimum(ties, limit - above)
        if share < 1.0:
            left = share * unit.to(tl.float64) - mass_above.to(tl.float64)
            left = tl.ceil(left / tl.maximum(each, 1).to(tl.float64))
            room = tl.minimum(room, tl.maximum(left, 1.0).to(tl.int64))
        kept = tl.where(share < 1.0, -1, mass_above + room * each)  # the second search's total: top-k's alone
        if room < ties:  # the room-th of the ids whose logit is the cut: first its block, then its place
            block = tl.arange(0, CANDIDATES)
            here = tl.load(block_ties + row * num_blocks + block, mask=block < num_blocks, other=0)
            before = (tl.cumsum(here, 0) - here).to(tl.int64)
            found = tl.max(tl.where((before < room) & (here > 0), block, 0), 0)
            skipped = tl.sum(tl.where(block == found, before, 0), 0)
            ids = found * BLOCK + tl.arange(0, BLOCK)
            tied = (key_of(_load(logits, row, stride, ids, num_valid)).to(tl.int64) == key) & (ids < num_valid)
            rank = skipped + tl.cumsum(tied.to(tl.int32), 0)
            last = tl.min(tl.where(tied & (rank == room), ids, _ANY_ID), 0)
    if (temperature > 0.0) & (min_p > 0.0):
        floor = row_max(tops, row, num_blocks, CANDIDATES) + temperature * tl.log(min_p)
        if floor > cut:
            cut, last = floor, tl.full((), _ANY_ID, tl.int32)
    tl.store(cuts + row, cut)
    tl.store(last_ids + row, last)
    tl.store(totals + row, kept)


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

    Rows without filters, and greedy ones, get (-inf, any id). Needs the whole vocabulary; no host: can be captured.

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
    block_ties = torch.empty((rows, num_blocks), dtype=torch.int32, device=device)
    states = torch.empty((_PASSES + 1, rows, 4), dtype=torch.int64, device=device)
    for number, shares_R in enumerate(searches):
        sums = torch.zeros((_PASSES, rows, 2, 16), dtype=torch.int64, device=device)
        shape = {"HAS_TOTALS": number > 0, "CANDIDATES": triton.next_power_of_2(num_blocks), "BLOCK": BLOCK}
        inputs = (logits_RV, tops, states, sums, temperatures_R, limits_R, shares_R, totals, block_ties)
        extent = (logits_RV.stride(0), valid, num_blocks, rows)
        for step in range(_PASSES + 1):
            _pass[(rows, num_blocks)](*inputs, *extent, **shape, PASS=step)
        _finish[(rows,)](*inputs, min_ps_R, cuts, last_ids, *extent, **shape)
    return cuts, last_ids
