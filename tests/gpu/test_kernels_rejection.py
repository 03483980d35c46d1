"""Filters, proposals and mixed verdicts on the device against ``core``: cuts, tokens, values, and the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("msgspec")

from pearl_ray.core import sampling
from pearl_ray.core.logits import Row, distributions, filtered_scores
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.verify import Segment, verify
from pearl_ray.kernels import rejection
from pearl_ray.kernels.filters import find_cuts
from pearl_ray.kernels.proposal import propose
from pearl_ray.kernels.race import Draws, race, reduce
from tests.kernel_checks import CAN_RUN, DEVICE, INTERPRETING, REASON, fresh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

VOCAB = 701 if INTERPRETING else 151_937

FILTERS = [
    SamplingParams(temperature=0.8, top_k=50),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.0, top_k=5),
    SamplingParams(temperature=2.0, top_p=0.99),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=0.6, top_p=1e-6),
    SamplingParams(temperature=1.0, top_k=2000, top_p=0.5),
    SamplingParams(temperature=1.0, min_p=1.0),
]

if INTERPRETING:  # slow: the fewest that reach every branch
    FILTERS = [FILTERS[3], FILTERS[1], FILTERS[4], FILTERS[5]]


def cuts_of(
    logits: torch.Tensor, params: list[SamplingParams], num_valid: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return find_cuts(
        logits,
        torch.tensor([p.temperature for p in params], device=DEVICE),
        torch.tensor([p.top_k for p in params], dtype=torch.int32, device=DEVICE),
        torch.tensor([p.top_p for p in params], dtype=torch.float64, device=DEVICE),
        torch.tensor([p.min_p for p in params], device=DEVICE),
        num_valid=num_valid,
    )


def rows_of(params: list[SamplingParams]) -> list[Row]:
    return [Row(p, seed=1000 + i, sample_index=i % 3, position=50 + i) for i, p in enumerate(params)]


def draws_of(rows: list[Row], cuts: tuple[torch.Tensor, torch.Tensor] | None = None) -> Draws:
    seeds = [(r.seed + 2**63) % 2**64 - 2**63 for r in rows]
    return Draws(
        torch.tensor(seeds, device=DEVICE),
        torch.tensor([r.position for r in rows], dtype=torch.int32, device=DEVICE),
        torch.tensor([r.sample_index for r in rows], dtype=torch.int32, device=DEVICE),
        torch.tensor([r.params.temperature for r in rows], device=DEVICE),
        *(cuts or (None, None)),
    )


@pytest.mark.parametrize("kind", ["smooth", "tied", "negative", "wide"])
def test_what_the_cuts_keep_is_what_the_reference_keeps(kind: str) -> None:
    logits = fresh(len(FILTERS), VOCAB, scale=3.0)
    if kind == "tied":
        logits = (logits * 2).round() / 2
    if kind == "negative":
        logits = -logits.abs()
        logits[:, ::7] = -math.inf
        logits[:, 3] = 0.0
    if kind == "wide":
        logits = logits * 40
    cut, last = cuts_of(logits, FILTERS, VOCAB - 9)
    ids = torch.arange(VOCAB, device=DEVICE)
    kept = (logits > cut[:, None]) | ((logits == cut[:, None]) & (ids <= last[:, None]))
    kept = (kept & (ids < VOCAB - 9) & (logits > -math.inf)).cpu()
    expected = filtered_scores(logits.cpu(), rows_of(FILTERS), num_valid=VOCAB - 9) > -math.inf
    for row, params in enumerate(FILTERS):
        differing = int((kept[row] ^ expected[row]).sum())
        assert differing <= (1 if params.top_p < 1.0 else 0), (params, differing, int(expected[row].sum()))


def test_tokens_under_filters_are_the_references() -> None:
    rows = rows_of(FILTERS)
    logits = fresh(len(FILTERS), VOCAB, scale=3.0, dtype=torch.float32 if INTERPRETING else torch.bfloat16)
    _, token = reduce(*race(logits, draws_of(rows, cuts_of(logits, FILTERS, VOCAB - 9)), num_valid=VOCAB - 9))
    assert token[:, 0].tolist() == sampling.coupled_tokens(logits.cpu(), rows, num_valid=VOCAB - 9)


def test_a_proposal_is_the_references_and_sums_to_one() -> None:
    logits, rows = fresh(len(FILTERS), VOCAB, scale=3.0), rows_of(FILTERS)
    tokens, ids, probs = propose(logits, draws_of(rows, cuts_of(logits, FILTERS, VOCAB - 9)), num_valid=VOCAB - 9)
    expected_tokens, expected_ids, expected_probs = sampling.propose(logits.cpu(), rows, num_valid=VOCAB - 9)
    assert np.allclose(probs.cpu().numpy(), expected_probs, rtol=2e-5, atol=1e-9)
    assert (ids.cpu().numpy() == expected_ids).mean() > 0.99  # neighbours may swap where they round alike
    assert tokens.tolist() == expected_tokens
    assert np.allclose(probs.sum(-1).cpu().numpy(), 1.0, atol=1e-5)


@pytest.mark.parametrize("likeness", [0.0, 0.3, 3.0])
def test_mixed_verdicts_are_the_references(likeness: float) -> None:
    lengths, rules = [1, 4, 3, 5, 1, 6], [True, True, False, True, False, True]
    has_bonus = [False, True, True, False, True, True]
    if INTERPRETING:
        lengths, rules, has_bonus = [1, 3, 2], [True, True, False], [False, True, True]
    params = [FILTERS[(i * 5 + 3) % len(FILTERS)] for i in range(sum(lengths))]
    rows = rows_of(params)
    target = fresh(len(rows), VOCAB, scale=2.0)
    draft = target + fresh(len(rows), VOCAB, scale=likeness)
    cuts = cuts_of(target, params, VOCAB - 9)
    draft_draws = draws_of(rows, cuts_of(draft, params, VOCAB - 9))
    drawn, ids, probs = propose(draft, draft_draws, num_valid=VOCAB - 9)
    coupled = reduce(*race(draft, draft_draws, num_valid=VOCAB - 9))[1][:, 0].long()
    tested, is_rejection, starts, segments = torch.full((len(rows),), -1, device=DEVICE), [], [0], []
    for length, rule, bonus in zip(lengths, rules, has_bonus, strict=True):
        begin, end = starts[-1], starts[-1] + length
        tests = slice(begin, end - bonus)
        tested[tests] = (drawn if rule else coupled)[tests]
        is_rejection += [rule] * length
        starts.append(end)
        segments.append(
            Segment(
                tuple(rows[begin:end]),
                tuple(tested[tests].tolist()),
                rule,
                ids[tests].cpu().numpy() if rule else None,
                probs[tests].cpu().numpy() if rule else None,
            )
        )
    accepted, token = rejection.verify(
        target,
        draws_of(rows, cuts),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        tested,
        torch.tensor(is_rejection, device=DEVICE),
        ids,
        probs,
        8,
        num_valid=VOCAB - 9,
    )
    expected = verify(target.cpu(), segments, num_valid=VOCAB - 9)
    got = list(zip(accepted.tolist(), token.tolist(), strict=True))
    assert got == [(v.num_accepted, v.token) for v in expected]


def test_a_verdict_is_the_same_alone_and_beside_longer_windows() -> None:
    lengths = [1, 5, 2] if INTERPRETING else [1, 9, 2, 40, 3, 17, 1, 64]
    params = [FILTERS[i % len(FILTERS)] for i in range(sum(lengths))]
    rows = rows_of(params)
    target = fresh(len(rows), VOCAB, scale=2.0)
    draft = target + fresh(len(rows), VOCAB, scale=0.05)
    tested, ids, probs = propose(draft, draws_of(rows, cuts_of(draft, params)))

    def verdicts(begin: int, counts: list[int]) -> list[tuple[int, int]]:
        at = slice(begin, begin + sum(counts))
        draws = draws_of(rows[at], cuts_of(target[at], params[at]))
        starts = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32, device=DEVICE)
        rule = torch.ones(sum(counts), dtype=torch.bool, device=DEVICE)
        found = rejection.verify(target[at], draws, starts, tested[at], rule, ids[at], probs[at], max(counts))
        return list(zip(*(some.tolist() for some in found), strict=True))

    together = verdicts(0, lengths)
    starts = np.cumsum([0, *lengths]).tolist()
    assert together == [verdicts(start, [count])[0] for start, count in zip(starts, lengths, strict=False)]


@pytest.mark.skipif(INTERPRETING, reason="many draws")
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.9), SamplingParams(temperature=1.2, top_p=0.85)], ids=str
)
def test_proposal_test_and_replacement_leave_the_targets_distribution(params: SamplingParams) -> None:
    count, size = 200_000, 12
    target = torch.randn(size, device=DEVICE)
    draft = target + torch.randn(size, device=DEVICE)
    keys = draws_of([Row(params, 0, 0, 0)])
    draws = Draws(
        torch.randint(-(2**63), 2**63 - 1, (count,), device=DEVICE),
        torch.arange(count, dtype=torch.int32, device=DEVICE),
        torch.zeros(count, dtype=torch.int32, device=DEVICE),
        keys.temperatures_R.expand(count).contiguous(),
    )

    def cut(logits: torch.Tensor) -> Draws:
        values, last = cuts_of(logits[None], [params])
        return Draws(
            draws.seeds_R, draws.positions_R, draws.samples_R, draws.temperatures_R,
            values.expand(count).contiguous(), last.expand(count).contiguous(),
        )  # fmt: skip

    tokens, ids, probs = propose(draft.expand(count, -1).contiguous(), cut(draft))
    accepted, token = rejection.verify(
        target.expand(count, -1).contiguous(),
        cut(target),
        torch.arange(count + 1, dtype=torch.int32, device=DEVICE),
        tokens,
        torch.ones(count, dtype=torch.bool, device=DEVICE),
        ids,
        probs,
        1,
    )
    committed = torch.where(accepted == 1, tokens, token).cpu().numpy()
    assert 0.05 < float(accepted.float().mean()) < 0.999
    p = distributions(target.cpu()[None], [Row(params, 0, 0, 0)])[0].double().numpy()
    seen = np.bincount(committed, minlength=size)
    assert seen[p == 0.0].sum() == 0
    chi_square = float(((seen - p * count) ** 2 / np.maximum(p * count, 1e-9))[p > 0.0].sum())
    assert chi_square < 50.0  # at most 11 degrees of freedom: under one in a million
