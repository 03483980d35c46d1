"""The test: which drafted tokens are the target's, and what stands in place of the first that isn't (DESIGN section 3).

Knows one round's logits rows and what is tested against them; knows no phases, caches, processes or stop conditions.

`coupled`: a token passes iff it is the target's own, argmax_v(logit(v) + T g(v)) with the noise that the draft used;
the target's own token is the replacement. (Drafter-invariant: Daliri, Musco, Suresh, arXiv 2408.07978.)

`rejection`: a token d drawn from q passes iff u q(d) < p(d), strictly; else the replacement is drawn from the residual
max(p - q, 0). (Leviathan et al., arXiv 2211.17192.) p and q are float32; u q(d) and p(d) are compared as doubles.

Which noise, under `rejection`: a position is committed once, in one of three ways, and each way has a purpose of its
own. Its proposal passes: DRAFT (the draw) and TEST. It fails: these and RESIDUAL. There was no proposal (the extra
token after a full acceptance, AR, a dead draft): COUPLED, which `rejection` uses nowhere else, and under which that
token is also the one that a `coupled` request draws. All are keyed by the position, so neighbours share no number; a
proposal that is dropped untested leaves its position's numbers unseen, so that they may serve the next one there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pearl_ray.core import rng
from pearl_ray.core.comm import Group
from pearl_ray.core.rng import Purpose
from pearl_ray.core.sampling import Row, coupled_tokens, coupled_tokens_sharded, distributions, race

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's rows of a round.

    Attributes:
        rows: in order of position; row i follows the committed tokens and ``tested[:i]``.
        tested: as many drafted tokens as rows, or one fewer: then the last row yields the target's own next token if
            all of them pass. Row i tests ``tested[i]``.
        rejection: which rule.
        proposal_ids, proposal_probs: int32 and float32 ``[len(tested), 64]``, what each was drawn from (`rejection`).
    """

    rows: tuple[Row, ...]
    tested: tuple[int, ...]
    rejection: bool = False
    proposal_ids: NDArray[np.int32] | None = None
    proposal_probs: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        assert self.rows and len(self.rows) - len(self.tested) in (0, 1)
        if self.rejection and self.tested:
            assert self.proposal_ids is not None and len(self.proposal_ids) >= len(self.tested)
            assert self.proposal_probs is not None and len(self.proposal_probs) >= len(self.tested)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of the tested tokens pass, and the token that follows them: the replacement of the first that fails, or
    the target's own next one; -1 where all passed and no row is left."""

    num_accepted: int
    token: int


def verify(logits_RV: torch.Tensor, segments: Sequence[Segment], *, num_valid: int | None = None) -> list[Verdict]:
    """Judge each segment by its rows of the logits ``[R, V]``, in order; ids from ``num_valid`` on are padding.

    Row by row over all segments at once, so that what lies behind a segment's first failure costs nothing.
    """
    starts = np.cumsum([0] + [len(s.rows) for s in segments]).tolist()
    assert starts[-1] == len(logits_RV)
    verdicts = [Verdict(0, -1)] * len(segments)
    alive, step = list(range(len(segments))), 0
    while alive:
        drawn: list[int] = []
        tested: list[int] = []
        for s in alive:
            is_test = segments[s].rejection and step < len(segments[s].tested)
            (tested if is_test else drawn).append(s)
        tokens: dict[int, int] = {}
        for group, judge in ((drawn, _draws), (tested, _tests)):
            if group:
                picked_AV = _pick(logits_RV, [starts[s] + step for s in group])
                tokens.update(zip(group, judge(picked_AV, [segments[s] for s in group], step, num_valid), strict=True))
        surviving = []
        for s in alive:
            segment = segments[s]
            if step == len(segment.tested) or tokens[s] != segment.tested[step]:
                verdicts[s] = Verdict(step, tokens[s])
            elif step + 1 == len(segment.rows):
                verdicts[s] = Verdict(step + 1, -1)
            else:
                surviving.append(s)
        alive, step = surviving, step + 1
    return verdicts


def verify_sharded(
    logits_local_RV: torch.Tensor,
    segments: Sequence[Segment],
    group: Group,
    vocab_sizes: Sequence[int],
    *,
    num_valid: int | None = None,
) -> list[Verdict]:
    """:func:`verify` where rank r holds ``vocab_sizes[r]`` ids: the same verdicts, bit for bit, on every rank.

    Collective. `coupled` rows without filters race on every rank's slice at once and exchange one (score, id) each. The
    other segments' logits are gathered and judged by rank 0 alone, which tells the others: CPU ranks share their cores.
    """
    if group.size == 1:
        return verify(logits_local_RV, segments, num_valid=num_valid)
    starts = np.cumsum([0] + [len(s.rows) for s in segments]).tolist()
    assert starts[-1] == len(logits_local_RV)
    gathered = [i for i, s in enumerate(segments) if s.rejection or any(r.is_filtered() for r in s.rows)]
    local = [i for i in range(len(segments)) if i not in set(gathered)]
    verdicts = [Verdict(0, -1)] * len(segments)

    def logits_of(which: Sequence[int]) -> torch.Tensor:
        return _pick(logits_local_RV, [r for i in which for r in range(starts[i], starts[i + 1])])

    if local:
        rows = [r for i in local for r in segments[i].rows]
        tokens = iter(coupled_tokens_sharded(logits_of(local), rows, group, vocab_sizes, num_valid=num_valid))
        for i in local:
            verdicts[i] = _compare([next(tokens) for _ in segments[i].rows], segments[i].tested)
    if gathered:
        logits_RV = group.all_gather(logits_of(gathered).contiguous(), vocab_sizes)
        message = torch.zeros((len(gathered), 2), dtype=torch.int64, device=logits_RV.device)
        if group.rank == 0:
            judged = verify(logits_RV, [segments[i] for i in gathered], num_valid=num_valid)
            message += torch.tensor([[v.num_accepted, v.token] for v in judged], device=logits_RV.device)
        told: list[list[int]] = group.broadcast_(message).tolist()
        for i, (num_accepted, token) in zip(gathered, told, strict=True):
            verdicts[i] = Verdict(num_accepted, token)
    return verdicts


def _compare(tokens: Sequence[int], tested: Sequence[int]) -> Verdict:
    """The `coupled` verdict, given the target's own token at every row."""
    for i, token in enumerate(tokens):
        if i == len(tested) or token != tested[i]:
            return Verdict(i, token)
    return Verdict(len(tested), -1)


def _pick(logits_RV: torch.Tensor, at: list[int]) -> torch.Tensor:
    """These rows, without a copy where they are neighbours."""
    if at[-1] - at[0] == len(at) - 1:
        return logits_RV[at[0] : at[-1] + 1]
    return logits_RV[at]


def _draws(logits_AV: torch.Tensor, segments: Sequence[Segment], step: int, num_valid: int | None) -> list[int]:
    """The target's own tokens."""
    return coupled_tokens(logits_AV, [s.rows[step] for s in segments], num_valid=num_valid)


def _tests(logits_AV: torch.Tensor, segments: Sequence[Segment], step: int, num_valid: int | None) -> list[int]:
    """The `rejection` rule: each segment's tested token where it passes, else the replacement.

    They differ: u q(d) >= p(d) and u < 1 imply q(d) > p(d), so d isn't in the residual. Only where p = q but for
    rounding may the race on p itself give d back, and then it has passed.
    """
    rows = [s.rows[step] for s in segments]
    tokens = np.array([s.tested[step] for s in segments], np.int64)
    id_AK = np.stack([s.proposal_ids[step] for s in segments if s.proposal_ids is not None]).astype(np.int64)
    q_AK = np.stack([s.proposal_probs[step] for s in segments if s.proposal_probs is not None])
    p_AV = distributions(logits_AV, rows, num_valid=num_valid)
    v = p_AV.shape[1]
    known = torch.from_numpy(np.minimum(tokens, v - 1)).to(p_AV.device)
    p_A = np.where(tokens < v, p_AV.gather(1, known[:, None])[:, 0].cpu().numpy(), 0.0).astype(np.float64)
    q_A = np.where(id_AK == tokens[:, None], q_AK, 0.0).max(-1).astype(np.float64)
    u_A = rng.uniforms(*_counters(rows), Purpose.TEST)
    (failed,) = np.nonzero(~(u_A * q_A < p_A))
    if len(failed):
        id_FK = np.where(id_AK < v, id_AK, 0)[failed]
        q_FK = np.where(id_AK < v, q_AK, 0.0).astype(np.float32)[failed]
        p_FV = p_AV if len(failed) == len(rows) else p_AV[torch.from_numpy(failed).to(p_AV.device)]
        tokens[failed] = _residual_tokens(p_FV, id_FK, q_FK, [rows[i] for i in failed.tolist()])
    drawn: list[int] = tokens.tolist()
    return drawn


def _residual_tokens(
    p_FV: torch.Tensor, id_FK: NDArray[np.int64], q_FK: NDArray[np.float32], rows: Sequence[Row]
) -> list[int]:
    """A Gumbel race over log(p - q) on p's support; over log p where no p > q (p = q but for rounding)."""
    residual_FV = p_FV.clone()
    residual_FV.scatter_add_(1, torch.from_numpy(id_FK).to(p_FV.device), torch.from_numpy(-q_FK).to(p_FV.device))
    weight_FV = torch.where(residual_FV.amax(-1, keepdim=True) > 0.0, residual_FV, p_FV)
    score_FV = torch.where(weight_FV > 0.0, rng.log(weight_FV.clamp(min=_TINY)), -torch.inf)
    tokens: list[int] = race(score_FV, rows, [1.0] * len(rows), Purpose.RESIDUAL)[1].tolist()
    return tokens


def _counters(rows: Sequence[Row]) -> tuple[list[int], list[int], list[int]]:
    return [r.seed for r in rows], [r.position for r in rows], [r.sample_index for r in rows]
