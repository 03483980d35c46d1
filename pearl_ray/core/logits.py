"""What a row of logits becomes before a token is drawn: penalties, bias, masks, filters, probabilities. Knows no noise.

Shapes: R rows, V token ids (of this rank's slice where sharded), F rows with filters. Logits are upcast to float32 at
least; float64 stays. A row's result depends on its own logits and parameters only, never on the batch.

The order: repetition, frequency and presence penalties, logit_bias, masked and allowed ids, temperature, top-k, top-p,
min-p. Tokens are ranked by (score descending, id ascending), so each cut is exact where scores tie:

- top-k keeps the first k;
- top-p keeps those of them before which less than top_p of their mass lies (at least one);
- min-p keeps those of them with at least min_p times the largest probability.

Temperature 0 is the greedy token, the first of that order; no cut removes it, so filters aren't computed there.
A row that allows no token at all has no distribution (NaN): whoever builds masks prevents it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pearl_ray.core.params import SamplingParams

_NEG_INF = -math.inf
_MIN_TEMPERATURE = 1e-30  # smaller ones are greedy: float32 can't hold their noise
_SORT_DEPTH = 1024  # how far top-p looks before it sorts the whole row
_CHUNK = 1 << 17  # scores filtered at a time: the intermediates stay in the cache


@dataclass(frozen=True, slots=True)
class Row:
    """One logits row to sample from.

    Attributes:
        params: of the request.
        seed: the request's 64-bit seed.
        sample_index: which of the request's n samples.
        position: absolute index, in prompt + output, of the token being sampled.
        prompt, output: the tokens before this one; read where ``params.has_penalties`` only.
        masked: ids that may not be chosen here (min_tokens).
        allowed: bool ``[V]`` over the full vocabulary, a grammar's mask; None allows all.
    """

    params: SamplingParams
    seed: int
    sample_index: int
    position: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    masked: Sequence[int] = ()
    allowed: torch.Tensor | None = None

    def temperature(self, draft: bool) -> float:
        """The target's or the draft's temperature; 0.0 is greedy."""
        p = self.params
        t = p.draft_temperature if draft and p.draft_temperature is not None else p.temperature
        return t if t >= _MIN_TEMPERATURE else 0.0

    def is_filtered(self, draft: bool = False) -> bool:
        """Whether top-k, top-p or min-p cut its support, for which the whole vocabulary is needed."""
        return self.params.has_filters and self.temperature(draft) > 0.0


def adjusted_logits(logits_RV: torch.Tensor, rows: Sequence[Row], *, vocab_start: int = 0) -> torch.Tensor:
    """The logits, upcast, after penalties, bias and masks (not temperature). The input isn't written to.

    ``logits_RV`` is the vocabulary's slice from ``vocab_start`` on. Penalties as vLLM's: repetition over prompt and
    output (divides positive logits, multiplies the others), then frequency and presence over the output.
    """
    assert len(rows) == len(logits_RV)
    upcast_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    penalised = any(row.params.has_penalties for row in rows)
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    masked = [i for i, row in enumerate(rows) if len(row.masked)]
    allowed = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not (penalised or biased or masked or allowed):
        return upcast_RV
    x_RV = upcast_RV.clone() if upcast_RV.data_ptr() == logits_RV.data_ptr() else upcast_RV
    if penalised:
        _penalise(x_RV, rows, vocab_start)
    if biased:
        ids = [np.fromiter(rows[i].params.logit_bias, np.int64) for i in biased]
        bias = np.concatenate([np.fromiter(rows[i].params.logit_bias.values(), np.float64) for i in biased])
        row_N, id_N, here = _entries(biased, ids, x_RV, vocab_start)
        x_RV[row_N, id_N] += torch.from_numpy(bias[here]).to(x_RV.device, x_RV.dtype)
    if masked:
        row_N, id_N, _ = _entries(masked, [np.asarray(rows[i].masked, np.int64) for i in masked], x_RV, vocab_start)
        x_RV[row_N, id_N] = _NEG_INF
    for i in allowed:
        mask = rows[i].allowed
        assert mask is not None
        local = mask[vocab_start : vocab_start + x_RV.shape[1]].to(x_RV.device)
        x_RV[i, : len(local)].masked_fill_(~local, _NEG_INF)
        x_RV[i, len(local) :] = _NEG_INF
    return x_RV


def filtered_scores(
    adjusted_RV: torch.Tensor, rows: Sequence[Row], *, draft: bool = False, num_valid: int | None = None
) -> torch.Tensor:
    """The adjusted logits (not divided by the temperature), -inf outside the support left by top-k, top-p, min-p.

    Needs the whole vocabulary; ids from ``num_valid`` on are padding. Greedy rows come back uncut.
    """
    x_RV = adjusted_RV
    if num_valid is not None and num_valid < x_RV.shape[1]:
        x_RV = x_RV.clone()
        x_RV[:, num_valid:] = _NEG_INF
    cut = [i for i, row in enumerate(rows) if row.is_filtered(draft)]
    if not cut:
        return x_RV
    every = len(cut) == len(rows)
    x_FV = x_RV if every else x_RV[cut]
    chunk = max(1, _CHUNK // x_FV.shape[1])
    kept_FV = torch.cat(
        [_support(x_FV[i : i + chunk], [rows[j] for j in cut[i : i + chunk]], draft) for i in range(0, len(cut), chunk)]
    )
    scores_FV = torch.where(kept_FV, x_FV, _NEG_INF)
    if every:
        return scores_FV
    x_RV = x_RV.clone() if x_RV is adjusted_RV else x_RV
    x_RV[cut] = scores_FV
    return x_RV


def target_distribution(
    logits_V: torch.Tensor, row: Row, *, draft: bool = False, num_valid: int | None = None
) -> torch.Tensor:
    """p(·) of one row (q with ``draft``), float32 ``[V]``, normalised after all filters; greedy is one-hot."""
    return distributions(logits_V[None], [row], draft=draft, num_valid=num_valid)[0]


def distributions(
    logits_RV: torch.Tensor, rows: Sequence[Row], *, draft: bool = False, num_valid: int | None = None
) -> torch.Tensor:
    """:func:`target_distribution` of R rows, float32 ``[R, V]``."""
    scores_RV = filtered_scores(adjusted_logits(logits_RV, rows), rows, draft=draft, num_valid=num_valid)
    temperatures = [row.temperature(draft) for row in rows]
    divisor_R1 = torch.tensor([t or 1.0 for t in temperatures], dtype=scores_RV.dtype, device=scores_RV.device)[:, None]
    p_RV = (scores_RV - scores_RV.amax(-1, keepdim=True)).div_(divisor_R1).exp_()
    # The sum is rounded to float32 from float64, so that it doesn't depend on how torch splits the reduction.
    p_RV = p_RV.div_(p_RV.sum(-1, keepdim=True, dtype=torch.float64).to(p_RV.dtype)).to(torch.float32)
    greedy = [i for i, t in enumerate(temperatures) if t == 0.0]
    if greedy:
        ids = argmax(scores_RV[greedy])[1]
        p_RV[greedy] = 0.0
        p_RV[greedy, ids] = 1.0
    return p_RV


def argmax(x_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(max, first argmax) of each row. On a CPU numpy's argmax takes a tenth of torch's time."""
    if x_RV.device.type == "cpu":
        ids = torch.from_numpy(x_RV.numpy().argmax(axis=-1).astype(np.int64))
    else:
        ids = x_RV.argmax(-1)
    return x_RV.gather(1, ids[:, None])[:, 0], ids


def _support(x_FV: torch.Tensor, rows: Sequence[Row], draft: bool) -> torch.Tensor:
    """bool ``[F, V]``: what top-k, top-p and min-p keep. In float64, so that no cut hangs on a rounded sum."""
    device = x_FV.device

    def column(value: Callable[[Row], float]) -> torch.Tensor:
        return torch.tensor([value(row) for row in rows], dtype=torch.float64, device=device)[:, None]

    v = x_FV.shape[1]
    z_FV = x_FV.double()
    z_FV = (z_FV - z_FV.amax(-1, keepdim=True)) / column(lambda r: r.temperature(draft))
    kept_FV = z_FV >= column(lambda r: math.log(r.params.min_p) if r.params.min_p > 0.0 else _NEG_INF)
    ranked = [i for i, r in enumerate(rows) if 0 < r.params.top_k < v or r.params.top_p < 1.0]
    if not ranked:
        return kept_FV
    depth = min(v, max([_SORT_DEPTH] + [r.params.top_k for r in rows if r.params.top_k < v]))
    while ranked:
        z_NV, some = z_FV[ranked], [rows[i] for i in ranked]
        count_N1, top_ND, short = _num_ranked(z_NV, some, depth)
        enough = [j for j in range(len(ranked)) if not short[j]]
        if enough:
            kept_FV[[ranked[j] for j in enough]] &= first_k(z_NV[enough], count_N1[enough], top_ND[enough])
        ranked, depth = [i for j, i in enumerate(ranked) if short[j]], v
    return kept_FV


def _num_ranked(z_NV: torch.Tensor, rows: Sequence[Row], depth: int) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """How many tokens top-k and top-p keep ``[N, 1]``, the ``depth`` largest scores, and whose cut lies deeper."""
    v, device = z_NV.shape[1], z_NV.device
    limits = [r.params.top_k if 0 < r.params.top_k < v else v for r in rows]
    limit_N1 = torch.tensor(limits, device=device)[:, None]
    top_p_N1 = torch.tensor([r.params.top_p for r in rows], dtype=torch.float64, device=device)[:, None]
    top_ND = z_NV.topk(depth, dim=-1).values
    mass_ND = top_ND.exp().masked_fill_(torch.arange(depth, device=device) >= limit_N1, 0.0)
    before_ND = torch.zeros_like(mass_ND)
    torch.cumsum(mass_ND[:, :-1], -1, out=before_ND[:, 1:])
    total_N1 = before_ND[:, -1:] + mass_ND[:, -1:]  # in order of rank, so that it doesn't depend on the depth
    if v in limits:
        total_N1 = torch.where(limit_N1 < v, total_N1, z_NV.exp().sum(-1, keepdim=True))
    by_mass_N1 = (before_ND < top_p_N1 * total_N1).sum(-1, keepdim=True).clamp_(min=1)
    count_N1 = torch.where(top_p_N1 < 1.0, torch.minimum(by_mass_N1, limit_N1), limit_N1)
    short = ((by_mass_N1 == depth) & (limit_N1 > depth))[:, 0].tolist()
    return count_N1, top_ND, short


def first_k(x_NV: torch.Tensor, count_N1: torch.Tensor, top_ND: torch.Tensor) -> torch.Tensor:
    """bool ``[N, V]``: the first ``count`` ids by (score descending, id ascending); ``top``: the largest scores."""
    last_N1 = top_ND.gather(1, (count_N1 - 1).clamp(max=top_ND.shape[1] - 1))
    kept_NV, tied_NV = x_NV > last_N1, x_NV == last_N1
    room_N1 = count_N1 - kept_NV.sum(-1, keepdim=True)
    if bool((tied_NV.sum(-1, keepdim=True) > room_N1).any()):  # rare, and dear for a long vocabulary
        tied_NV &= tied_NV.cumsum(-1) <= room_N1
    return kept_NV | tied_NV


def _tokens(row: Row, *, prompt: bool) -> NDArray[np.int64]:
    """The tokens before this one, the prompt's too or the output's only."""
    output = np.asarray(row.output, np.int64)
    return np.concatenate([np.asarray(row.prompt, np.int64), output]) if prompt else output


def _entries(
    which: Sequence[int], ids: Sequence[NDArray[np.int64]], x_RV: torch.Tensor, vocab_start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.intp]]:
    """(row, local id) index pairs of the ids that lie in this slice, and where in the concatenation they stood."""
    flat = np.concatenate(ids) - vocab_start
    row = np.repeat(np.asarray(which, np.int64), [len(i) for i in ids])
    (here,) = np.nonzero((flat >= 0) & (flat < x_RV.shape[1]))
    return row[here], flat[here], here


def _penalise(x_RV: torch.Tensor, rows: Sequence[Row], vocab_start: int) -> None:
    """Repetition, then frequency, then presence penalties, in place, touching only the ids that occurred."""
    v, device = x_RV.shape[1], x_RV.device

    def occurring(which: Sequence[int], prompt: bool) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.intp]]:
        row_N, id_N, _ = _entries(which, [_tokens(rows[i], prompt=prompt) for i in which], x_RV, vocab_start)
        keys, counts = np.unique(row_N * v + id_N, return_counts=True)
        return keys // v, keys % v, counts

    def per_row(field: str, row_N: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([getattr(row.params, field) for row in rows], np.float64)[row_N]

    def moved(values: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(values).to(device, x_RV.dtype)

    repeated = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if repeated:
        row_N, id_N, _ = occurring(repeated, prompt=True)
        x_N, penalty_N = x_RV[row_N, id_N], moved(per_row("repetition_penalty", row_N))
        x_RV[row_N, id_N] = torch.where(x_N > 0.0, x_N / penalty_N, x_N * penalty_N)
    counted = [i for i, row in enumerate(rows) if row.params.frequency_penalty or row.params.presence_penalty]
    if counted:
        row_N, id_N, counts = occurring(counted, prompt=False)
        frequency_N = moved(per_row("frequency_penalty", row_N)) * moved(counts.astype(np.float64))
        x_RV[row_N, id_N] = x_RV[row_N, id_N] - frequency_N - moved(per_row("presence_penalty", row_N))
