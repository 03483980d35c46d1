"""The draft's proposal under the rejection rule, on the device: a token, and the 64 probabilities behind it.

q is the row's distribution after temperature and filters, cut to its 64 first tokens by (logit descending, id
ascending) and renormalised; the token is a Gumbel race over exactly the float32 values that are sent.

Shapes: R rows, V ids, K = 64 entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.core.rng import Purpose
from pearl_ray.kernels.filters import find_cuts
from pearl_ray.kernels.noise import gumbel_at
from pearl_ray.kernels.race import BLOCK, Draws, best_of, load_block

NUM_ENTRIES = 64
_DRAFT = int(Purpose.DRAFT)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _collect(
    logits,
    cuts,
    last_ids,
    found,
    found_ids,
    found_logits,
    stride,
    num_valid,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the kept tokens of one block of a row behind those of the blocks that came before it, in any order."""
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = load_block(logits, row, stride, ids, 0, num_valid, num_valid, cuts, last_ids, True)
    kept = x > float("-inf")
    here = tl.sum(kept.to(tl.int32), 0)
    if here > 0:
        to = tl.atomic_add(found + row, here) + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(found_ids + row * ENTRIES + to, ids, mask=kept & (to < ENTRIES))
        tl.store(found_logits + row * ENTRIES + to, x, mask=kept & (to < ENTRIES))


@triton.jit
def _propose(
    seeds,
    positions,
    samples,
    temperatures,
    found,
    found_ids,
    found_logits,
    tokens,
    ids_out,
    probs_out,
    PURPOSE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0)
    num_found = tl.load(found + row)
    entry = tl.arange(0, ENTRIES)
    exists = entry < num_found
    ids = tl.load(found_ids + row * ENTRIES + entry, mask=exists, other=_NO_ID)
    x = tl.load(found_logits + row * ENTRIES + entry, mask=exists, other=float("-inf"))
    again = tl.arange(0, ENTRIES)  # the same entries along the other axis
    others = tl.load(found_logits + row * ENTRIES + again, mask=again < num_found, other=float("-inf"))
    other_ids = tl.load(found_ids + row * ENTRIES + again, mask=again < num_found, other=_NO_ID)
    is_before = (others[None, :] > x[:, None]) | ((others[None, :] == x[:, None]) & (other_ids[None, :] < ids[:, None]))
    rank = tl.sum((is_before & (again < num_found)[None, :]).to(tl.int32), 1)
    to = row * ENTRIES + tl.where(exists, rank, entry)
    tl.store(ids_out + to, ids)
    tl.store(probs_out + to, x)
    tl.debug_barrier()  # all entries are there before they're read by rank: an order in which the sum has the same bits
    at = row * ENTRIES + entry
    ids, x = tl.load(ids_out + at), tl.load(probs_out + at)
    tl.debug_barrier()
    temperature = tl.load(temperatures + row)
    weight = tl.exp((x - tl.max(x, 0)) / tl.where(temperature > 0.0, temperature, 1.0))
    weight = tl.where(exists, weight, 0.0)
    q = weight / tl.sum(weight, 0)
    noise = gumbel_at(tl.load(seeds + row), tl.load(positions + row), tl.load(samples + row), PURPOSE, ids)
    chance = tl.where(q > 0.0, q, 1.0).to(tl.float64)
    score = tl.where(q > 0.0, tl.log(chance) + noise.to(tl.float64), float("-inf"))
    _, token = best_of(score, ids)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(ids_out + at, tl.where(q > 0.0, ids, 0))
    tl.store(probs_out + at, q)


def propose(
    logits_RV: torch.Tensor,
    draws: Draws,
    *,
    num_valid: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``core.sampling.propose`` on the device: tokens int64 ``[R]``, ids int32 and probabilities float32 ``[R, 64]``.

    Largest first; unused entries are (0, 0.0); temperature 0 gives one entry of probability 1. ``draws`` holds the
    draft's temperatures, and the filters' cuts if there are any. Needs the whole vocabulary.
    """
    rows, size = logits_RV.shape
    valid = size if num_valid is None else min(size, num_valid)
    device = logits_RV.device
    most_R = torch.where(draws.temperatures_R > 0.0, NUM_ENTRIES, 1)
    one_R = torch.ones_like(draws.temperatures_R)
    cuts, last_ids = find_cuts(
        logits_RV, one_R, most_R, one_R.double(), torch.zeros_like(one_R), num_valid=valid, has_both=False
    )
    if draws.cuts_R is not None and draws.last_ids_R is not None:
        tighter = (draws.cuts_R > cuts) | ((draws.cuts_R == cuts) & (draws.last_ids_R < last_ids))
        cuts = torch.where(tighter, draws.cuts_R, cuts)
        last_ids = torch.where(tighter, draws.last_ids_R, last_ids)
    found_ids, ids = (torch.empty((rows, NUM_ENTRIES), dtype=torch.int32, device=device) for _ in range(2))
    found_logits, probs = (torch.empty((rows, NUM_ENTRIES), dtype=torch.float32, device=device) for _ in range(2))
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    found = torch.zeros(rows, dtype=torch.int32, device=device)
    _collect[(rows, triton.cdiv(valid, BLOCK))](
        logits_RV, cuts, last_ids, found, found_ids, found_logits, logits_RV.stride(0), valid,
        ENTRIES=NUM_ENTRIES, BLOCK=BLOCK,
    )  # fmt: skip
    _propose[(rows,)](
        draws.seeds_R, draws.positions_R, draws.samples_R, draws.temperatures_R,
        found, found_ids, found_logits, tokens, ids, probs,
        PURPOSE=_DRAFT, ENTRIES=NUM_ENTRIES, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, ids, probs
