"""From logits to tokens: the race with noise, alone or over shards, and the draft's proposals. Knows no phases.

Shapes: R rows, V token ids (of this rank's slice where sharded), K = 64 proposal entries. A row's token depends on its
own logits, parameters, seed and position only, never on the batch. What precedes the race (penalties, masks, filters,
and their order) is ``logits.py``'s and exported from here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pearl_ray.core import rng
from pearl_ray.core.comm import Group
from pearl_ray.core.logits import (
    Row,
    adjusted_logits,
    argmax,
    distributions,
    filtered_scores,
    first_k,
    target_distribution,
)
from pearl_ray.core.messages import MAX_PROPOSALS
from pearl_ray.core.rng import Purpose

__all__ = [
    "Row",
    "adjusted_logits",
    "coupled_tokens",
    "coupled_tokens_sharded",
    "distributions",
    "filtered_scores",
    "propose",
    "race",
    "target_distribution",
]

_CHUNK = 1 << 16  # noise numbers made at a time, of short rows
_LONG = 4096  # from this vocabulary on, a CPU skips the noise that can't win, row by row


def coupled_tokens(
    logits_RV: torch.Tensor, rows: Sequence[Row], *, draft: bool = False, num_valid: int | None = None
) -> list[int]:
    """argmax_v(logit(v) + T g(v)) over each row's support, with the noise that target and draft share.

    Daliri, Musco, Suresh, arXiv 2408.07978. T = 0 is greedy. Ties go to the lowest id.
    """
    adjusted_RV = adjusted_logits(logits_RV, rows)[:, :num_valid]
    scores_RV = filtered_scores(adjusted_RV, rows, draft=draft)
    ids: list[int] = race(scores_RV, rows, [row.temperature(draft) for row in rows], Purpose.COUPLED)[1].tolist()
    return ids


def coupled_tokens_sharded(
    logits_local_RV: torch.Tensor,
    rows: Sequence[Row],
    group: Group,
    vocab_sizes: Sequence[int],
    *,
    draft: bool = False,
    num_valid: int | None = None,
) -> list[int]:
    """:func:`coupled_tokens` where rank r holds ``vocab_sizes[r]`` ids: the same answer, bit for bit, on every rank.

    Collective. Each rank runs its slice of the race and gathers one (score, id) per row; rows with filters gather
    their logits instead. ``allowed`` masks are over the full vocabulary.
    """
    if group.size == 1:
        return coupled_tokens(logits_local_RV, rows, draft=draft, num_valid=num_valid)
    whole = [i for i, row in enumerate(rows) if row.is_filtered(draft)]
    apart = [i for i in range(len(rows)) if i not in set(whole)]
    ids = [0] * len(rows)
    if apart:
        logits_RV, some = (logits_local_RV[apart], [rows[i] for i in apart]) if whole else (logits_local_RV, rows)
        best_R, id_R = _local_race(logits_RV, some, group.rank, vocab_sizes, draft, num_valid)
        pairs = torch.stack([best_R.double(), id_R.double()], dim=1)  # both exact in float64
        gathered = group.all_gather(pairs, [2] * group.size)
        winner = argmax(gathered[:, 0::2].contiguous())[1]  # the first rank of equals holds the lower ids
        for i, token in zip(apart, gathered[:, 1::2].gather(1, winner[:, None])[:, 0].long().tolist(), strict=True):
            ids[i] = token
    if whole:
        logits_RV = group.all_gather(logits_local_RV[whole].contiguous(), vocab_sizes)
        some = [rows[i] for i in whole]
        for i, token in zip(whole, coupled_tokens(logits_RV, some, draft=draft, num_valid=num_valid), strict=True):
            ids[i] = token
    return ids


def propose(
    logits_RV: torch.Tensor, rows: Sequence[Row], *, num_valid: int | None = None
) -> tuple[list[int], NDArray[np.int32], NDArray[np.float32]]:
    """The `rejection` rule's draft: a token per row, and the distribution that it was drawn from.

    q is cut to its top 64 (ties: lowest ids), renormalised in float32; the token is a Gumbel race over exactly those
    float32 values. Returns tokens, ids int32 ``[R, 64]`` and probabilities float32 ``[R, 64]``, largest first; unused
    entries are (0, 0.0). Temperature 0: one entry of probability 1.
    """
    q_RV = distributions(logits_RV, rows, draft=True, num_valid=num_valid)
    k = min(MAX_PROPOSALS, q_RV.shape[1])
    kept_RV = first_k(q_RV, torch.full((len(rows), 1), k, device=q_RV.device), q_RV.topk(k, dim=-1).values)
    id_RK = kept_RV.nonzero()[:, 1].reshape(len(rows), k)  # ascending in each row
    q_RK = q_RV.gather(1, id_RK)
    q_RK, order = q_RK.sort(dim=-1, descending=True, stable=True)
    q_RK = q_RK / q_RK.sum(-1, keepdim=True)
    id_RK = torch.where(q_RK > 0.0, id_RK.gather(1, order), 0)
    noise = rng.gumbel_at_rows(*_counters(rows), Purpose.DRAFT, id_RK)
    score_RK = q_RK.double().log() + noise
    winner = torch.where(score_RK == score_RK.amax(-1, keepdim=True), id_RK, q_RV.shape[1]).amin(-1)
    ids = np.zeros((len(rows), MAX_PROPOSALS), np.int32)
    probs = np.zeros((len(rows), MAX_PROPOSALS), np.float32)
    ids[:, :k], probs[:, :k] = id_RK.cpu().numpy(), q_RK.cpu().numpy()
    tokens: list[int] = winner.tolist()
    return tokens, ids, probs


def race(
    scores_RV: torch.Tensor, rows: Sequence[Row], temperatures: Sequence[float], purpose: Purpose, vocab_start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(max, argmax) over v of score(v) + T g(v): each product and sum rounded once in the scores' type; lowest id wins.

    Returns the best scores ``[R]`` and int64 ids ``[R]`` (global: ``vocab_start`` is added).
    """
    best_R, id_R = argmax(scores_RV)
    hot = [i for i, t in enumerate(temperatures) if t > 0.0]
    if hot:
        best_R, id_R = best_R.clone(), id_R.clone()
    v, on_cpu = scores_RV.shape[1], scores_RV.device.type == "cpu"
    per_chunk = 1 if on_cpu and v >= _LONG else max(1, _CHUNK // v)
    for start in range(0, len(hot), per_chunk):
        chunk = hot[start : start + per_chunk]
        some, some_t = [rows[i] for i in chunk], [temperatures[i] for i in chunk]
        if per_chunk == 1 and on_cpu:
            i = chunk[0]
            best_R[i], id_R[i] = _race_of_one(scores_RV[i], int(id_R[i]), some[0], some_t[0], purpose, vocab_start)
            continue
        t_R1 = torch.tensor(some_t, dtype=scores_RV.dtype, device=scores_RV.device)[:, None]
        noise_RV = rng.gumbel(*_counters(some), purpose, vocab_start=vocab_start, vocab_size=v, device=scores_RV.device)
        x_RV = scores_RV if len(chunk) == len(rows) else scores_RV[chunk]
        best_R[chunk], id_R[chunk] = argmax(x_RV + t_R1 * noise_RV)
    return best_R, id_R + vocab_start


def _race_of_one(
    score_V: torch.Tensor, top_id: int, row: Row, temperature: float, purpose: Purpose, vocab_start: int
) -> tuple[torch.Tensor, int]:
    """The race of one long row on the CPU, without the noise of ids that can't win: the same answer, sooner.

    The top score's own id reaches ``sure`` = top + T g(top). An id whose score lies T times the largest noise below
    loses; so does one whose score lies 6 T below, if its word isn't among the few that make noise above 6.
    """
    counters = (row.seed, row.position, row.sample_index, purpose)
    t = torch.tensor(temperature, dtype=score_V.dtype)
    top = float(score_V[top_id])
    sure = top + temperature * rng.gumbel_estimate(*counters, vocab_start + top_id)
    slack = 1e-5 * (1.0 + abs(top) + temperature * rng.GUMBEL_MAX)  # far above float32's rounding
    able_V = score_V >= sure - temperature * rng.GUMBEL_MAX - slack
    if int(able_V.count_nonzero()) <= len(score_V) // 8:
        id_N = able_V.nonzero()[:, 0]
        noise_N = rng.gumbel_at(*counters, id_N + vocab_start)
    else:
        word_V = rng.words(*_counters([row]), purpose, vocab_start=vocab_start, vocab_size=len(score_V))[0]
        near_V = (score_V >= sure - temperature * rng.LARGE_GUMBEL - slack).numpy()
        (at_N,) = (near_V | (word_V < rng.LARGE_WORD)).nonzero()
        id_N, noise_N = torch.from_numpy(at_N), rng.gumbel_of_words(word_V[at_N])
    if not len(id_N):  # the logits hold NaN
        return score_V[top_id], top_id
    best, at = argmax((score_V[id_N] + t * noise_N)[None])
    return best[0], int(id_N[at[0]])


def _local_race(
    logits_RV: torch.Tensor,
    rows: Sequence[Row],
    rank: int,
    vocab_sizes: Sequence[int],
    draft: bool,
    num_valid: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's best (score, global id) of rows without filters; -inf where it holds padding only."""
    start = sum(vocab_sizes[:rank])
    valid = vocab_sizes[rank] if num_valid is None else min(vocab_sizes[rank], num_valid - start)
    if valid <= 0:
        nothing = torch.full((len(rows),), -math.inf, device=logits_RV.device)
        return nothing, torch.full_like(nothing, start, dtype=torch.int64)
    adjusted_RV = adjusted_logits(logits_RV, rows, vocab_start=start)[:, :valid]
    return race(adjusted_RV, rows, [row.temperature(draft) for row in rows], Purpose.COUPLED, start)


def _counters(rows: Sequence[Row]) -> tuple[list[int], list[int], list[int]]:
    """Seeds, positions and sample indices of the rows."""
    return [r.seed for r in rows], [r.position for r in rows], [r.sample_index for r in rows]
