"""The end of a round under the coupled rule, without the host: noise, argmax, accepted length, next token.

``race`` leaves each row's best (score, id) of every block of the vocabulary; ``judge`` reduces them, compares with the
drafted tokens, and writes each sequence's verdict. Between them stands the exchange between ranks, where there are any:
a rank's best (score, id) is one more block. Daliri, Musco, Suresh, arXiv 2408.07978.

Shapes: R rows of logits, V ids of this rank, N candidates (blocks, or ranks) per row, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pearl_ray.core import rng
from pearl_ray.core.rng import Purpose
from pearl_ray.kernels.noise import block_gumbel
from pearl_ray.kernels.overlap import OVERLAPPED, follow

BLOCK = 2048
_COUPLED = int(Purpose.COUPLED)
_NO_ID = tl.constexpr(2**31 - 1)
_MAX_CANDIDATES = 4096  # rows x blocks that one program of ``judge`` holds


@dataclass(frozen=True, slots=True)
class Draws:
    """What each row of logits is drawn with.

    Attributes:
        seeds_R: int64. positions_R, samples_R: int32 or int64.
        temperatures_R: float32; 0 is greedy.
        cuts_R, last_ids_R: float32 and int32: only logits above the cut, and those equal to it up to that id, take part
            (``filters.find_cuts``). None: all do.
    """

    seeds_R: torch.Tensor
    positions_R: torch.Tensor
    samples_R: torch.Tensor
    temperatures_R: torch.Tensor
    cuts_R: torch.Tensor | None = None
    last_ids_R: torch.Tensor | None = None


@triton.jit
def best_of(scores, ids):
    """(largest score, the lowest id that has it) of a vector."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, _NO_ID), 0)


@triton.jit
def load_block(logits, row, row_stride, ids, vocab_start, vocab_size, num_valid, cuts, last_ids, IS_CUT: tl.constexpr):
    """float32 logits of these ids, -inf where they're padding or cut off."""
    at = ids - vocab_start
    valid = (at >= 0) & (at < vocab_size) & (ids < num_valid)
    x = tl.load(logits + row.to(tl.int64) * row_stride + at, mask=valid, other=float("-inf")).to(tl.float32)
    if IS_CUT:
        cut = tl.load(cuts + row)
        x = tl.where((x > cut) | ((x == cut) & (ids <= tl.load(last_ids + row))), x, float("-inf"))
    return x


@triton.jit
def _race(
    logits,
    best,
    best_id,
    seeds,
    positions,
    samples,
    temperatures,
    cuts,
    last_ids,
    row_stride,
    vocab_start,
    vocab_size,
    num_valid,
    PURPOSE: tl.constexpr,
    IS_CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow()
    row, block = tl.program_id(0), tl.program_id(1)
    first = vocab_start // 4 * 4 + block * BLOCK
    ids = first + tl.arange(0, BLOCK)
    x = load_block(logits, row, row_stride, ids, vocab_start, vocab_size, num_valid, cuts, last_ids, IS_CUT)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        noise = block_gumbel(
            tl.load(seeds + row), tl.load(positions + row), tl.load(samples + row), PURPOSE, first, BLOCK
        )
        x = x + temperature * noise
    score, token = best_of(x, ids)
    at = row * tl.num_programs(1) + block
    tl.store(best + at, score)
    tl.store(best_id + at, token)


@triton.jit
def best_candidate(best, best_id, rows, exists, num_candidates, CANDIDATES: tl.constexpr):
    """(score, id) of each of ``rows`` (a vector) over its candidates."""
    candidate = tl.arange(0, CANDIDATES)
    at = rows[:, None] * num_candidates + candidate[None, :]
    here = exists[:, None] & (candidate < num_candidates)[None, :]
    scores = tl.load(best + at, mask=here, other=float("-inf"))
    ids = tl.load(best_id + at, mask=here, other=_NO_ID)
    top = tl.max(scores, 1)
    return top, tl.min(tl.where(scores == top[:, None], ids, _NO_ID), 1)


@triton.jit
def _reduce(best, best_id, score_out, id_out, num_candidates, CANDIDATES: tl.constexpr):
    follow()
    row = tl.program_id(0) + tl.arange(0, 1)
    score, token = best_candidate(best, best_id, row, row >= 0, num_candidates, CANDIDATES)
    tl.store(score_out + row, score)
    tl.store(id_out + row, token)


@triton.jit
def _judge(
    best,
    best_id,
    row_start,
    tested,
    num_accepted,
    next_token,
    row_token,
    num_candidates,
    ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    seq = tl.program_id(0)
    begin = tl.load(row_start + seq).to(tl.int32)
    count = tl.load(row_start + seq + 1).to(tl.int32) - begin
    at = tl.arange(0, ROWS)
    exists = at < count
    _, token = best_candidate(best, best_id, begin + at, exists, num_candidates, CANDIDATES)
    wanted = tl.load(tested + begin + at, mask=exists, other=-1).to(tl.int32)
    tl.store(row_token + begin + at, token.to(tl.int64), mask=exists)
    accepted = tl.min(tl.where(exists & (token == wanted), ROWS, at), 0)
    accepted = tl.minimum(accepted, count)
    chosen = tl.sum(tl.where(at == accepted, token, 0), 0)
    tl.store(num_accepted + seq, accepted)
    tl.store(next_token + seq, tl.where(accepted < count, chosen, -1).to(tl.int64))


def race(
    logits_RV: torch.Tensor,
    draws: Draws,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    purpose: int = _COUPLED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best scores float32 and global ids int32, ``[R, N]``, of each block; logits of any float type, upcast.

    score = logit + T g, each product and sum rounded once in float32; equal scores: the lowest id. ``num_valid``:
    global ids from there on are padding.
    """
    rows, size = logits_RV.shape
    assert logits_RV.stride(1) == 1
    num_blocks = triton.cdiv(size + vocab_start % 4, BLOCK)
    best = torch.empty((rows, num_blocks), dtype=torch.float32, device=logits_RV.device)
    best_id = torch.empty((rows, num_blocks), dtype=torch.int32, device=logits_RV.device)
    _race[(rows, num_blocks)](
        logits_RV,
        best,
        best_id,
        draws.seeds_R,
        draws.positions_R,
        draws.samples_R,
        draws.temperatures_R,
        draws.cuts_R if draws.cuts_R is not None else best,
        draws.last_ids_R if draws.last_ids_R is not None else best_id,
        logits_RV.stride(0),
        vocab_start,
        size,
        vocab_start + size if num_valid is None else num_valid,
        PURPOSE=purpose,
        IS_CUT=draws.cuts_R is not None,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **OVERLAPPED,
    )
    return best, best_id


def reduce(best_RN: torch.Tensor, best_id_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(score, id) ``[R, 1]`` of each row over its candidates: what a rank sends, or the draft's next token."""
    score, token = torch.empty_like(best_RN[:, :1]), torch.empty_like(best_id_RN[:, :1])
    count = best_RN.shape[1]
    _reduce[(len(best_RN),)](
        best_RN, best_id_RN, score, token, count, CANDIDATES=triton.next_power_of_2(count), **OVERLAPPED
    )
    return score, token


def judge(
    best_RN: torch.Tensor, best_id_RN: torch.Tensor, row_start_S1: torch.Tensor, tested_R: torch.Tensor, max_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Verdicts of S segments: accepted int32 ``[S]``, next token int64 ``[S]`` (-1 if all pass and no row is left).

    Args:
        row_start_S1: int32, each segment's first row, and R. An empty segment gets (0, -1).
        tested_R: int32 or int64, the drafted token that the row tests; -1 on a row that tests none.
        max_rows: at most so many rows per segment (fixed where captured).

    Returns:
        accepted, next token, and every row's own token int64 ``[R]``.
    """
    if triton.next_power_of_2(max_rows) * triton.next_power_of_2(best_RN.shape[1]) > _MAX_CANDIDATES:
        best_RN, best_id_RN = reduce(best_RN, best_id_RN)
    num_seqs, device = len(row_start_S1) - 1, best_RN.device
    accepted = torch.empty(num_seqs, dtype=torch.int32, device=device)
    token = torch.empty(num_seqs, dtype=torch.int64, device=device)
    row_token = torch.empty(len(best_RN), dtype=torch.int64, device=device)
    _judge[(num_seqs,)](
        best_RN,
        best_id_RN,
        row_start_S1,
        tested_R,
        accepted,
        token,
        row_token,
        best_RN.shape[1],
        ROWS=triton.next_power_of_2(max_rows),
        CANDIDATES=triton.next_power_of_2(best_RN.shape[1]),
    )
    return accepted, token, row_token


def race_reference(
    logits_RV: torch.Tensor,
    draws: Draws,
    *,
    vocab_start: int = 0,
    num_valid: int | None = None,
    purpose: int = _COUPLED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`race` then :func:`reduce` in torch, the noise by ``core.rng``; waits for the device."""
    scores_RV = logits_RV.float()
    ids_V = vocab_start + torch.arange(logits_RV.shape[1], device=logits_RV.device)
    if num_valid is not None:
        scores_RV = scores_RV.masked_fill(ids_V >= num_valid, -torch.inf)
    if draws.cuts_R is not None and draws.last_ids_R is not None:
        cut_R1 = draws.cuts_R[:, None]
        kept = (scores_RV > cut_R1) | ((scores_RV == cut_R1) & (ids_V <= draws.last_ids_R[:, None]))
        scores_RV = scores_RV.masked_fill(~kept, -torch.inf)
    keys = (draws.seeds_R.tolist(), draws.positions_R.tolist(), draws.samples_R.tolist())
    noise = rng.gumbel(*keys, purpose, vocab_start=vocab_start, vocab_size=logits_RV.shape[1]).to(logits_RV.device)
    scores_RV = scores_RV + draws.temperatures_R[:, None] * noise
    best_R1 = scores_RV.amax(-1, keepdim=True)
    id_R1 = torch.where(scores_RV == best_R1, ids_V, 2**31 - 1).amin(-1, keepdim=True)
    return best_R1, id_R1.int()
