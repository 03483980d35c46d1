"""The two tests on given rows: strictness, replacements, extra tokens, laziness, mixed batches, shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pearl_ray.core import rng
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.rng import Purpose
from pearl_ray.core.sampling import Row, coupled_tokens, propose, target_distribution
from pearl_ray.core.verify import Segment, Verdict, verify, verify_sharded
from tests.thread_group import on_ranks

VOCAB = 30
GREEDY = SamplingParams(temperature=0.0)


def _rows(params: SamplingParams, count: int, *, seed: int = 1, position: int = 10) -> tuple[Row, ...]:
    return tuple(Row(params, seed, 0, position + i, (1, 2, 3), (4,) * i) for i in range(count))


def _logits(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def _one_proposal(token: int, probability: float) -> tuple[np.ndarray, np.ndarray]:
    """A proposal of ``token``; what is left of the mass lies on token 0."""
    ids, probs = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.float32)
    ids[0, :2], probs[0, :2] = (token, 0), (probability, 1 - probability)
    return ids, probs


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_coupled_accepts_exactly_the_targets_own_tokens(temperature: float) -> None:
    rows, logits = _rows(SamplingParams(temperature=temperature), 4), _logits(4)
    own = coupled_tokens(logits, rows)
    assert verify(logits, [Segment(rows, tuple(own))]) == [Verdict(4, -1)]
    assert verify(logits, [Segment(rows, tuple(own[:3]))]) == [Verdict(3, own[3])]
    for j in range(4):
        wrong = [*own[:j], (own[j] + 1) % VOCAB, *own[j + 1 :]]
        assert verify(logits, [Segment(rows, tuple(wrong))]) == [Verdict(j, own[j])]
    assert verify(logits[:1], [Segment(rows[:1], ())]) == [Verdict(0, own[0])]


@pytest.mark.parametrize("seed", range(40))
def test_rejection_accepts_iff_u_times_q_is_below_p_strictly(seed: int) -> None:
    (row,), logits = _rows(SamplingParams(), 1, seed=seed), _logits(1, seed)
    u = rng.uniform(seed, 10, 0, Purpose.TEST)
    p = target_distribution(logits[0], row).double()
    token = 1 + int(p[1:].argmax())
    bound = float(p[token]) / u  # the q at which acceptance turns
    for q in (bound * 0.999, bound * 1.001):
        if q <= 1.0:
            verdict = verify(logits, [Segment((row,), (token,), True, *_one_proposal(token, q))])[0]
            assert (verdict.num_accepted == 1) == (u * float(np.float32(q)) < float(p[token]))
            assert verdict.num_accepted == 1 or verdict.token not in (-1, token)


def test_rejection_of_what_the_target_excludes_is_certain_and_equal_zeros_reject() -> None:
    (row,), logits = _rows(SamplingParams(top_k=2), 1), _logits(1)
    best = logits[0].topk(2).indices.tolist()
    excluded = next(v for v in range(1, VOCAB) if v not in best)
    for probability in (1e-30, 1.0):
        verdict = verify(logits, [Segment((row,), (excluded,), True, *_one_proposal(excluded, probability))])[0]
        assert verdict.num_accepted == 0 and verdict.token in best
    beyond = verify(logits, [Segment((row,), (VOCAB + 5,), True, *_one_proposal(VOCAB + 5, 1.0))])[0]
    assert beyond.num_accepted == 0 and beyond.token in best
    unproposed = (np.zeros((1, 64), np.int32), np.zeros((1, 64), np.float32))
    assert verify(logits, [Segment((row,), (excluded,), True, *unproposed)])[0].num_accepted == 0


def test_the_residual_is_drawn_from_p_minus_q_only() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]])).expand(20_000, -1)
    segments = [
        Segment(
            (Row(SamplingParams(), seed, 0, 3),), (1,), True, np.array([[1, 2]]), np.array([[0.9, 0.1]], np.float32)
        )
        for seed in range(20_000)
    ]
    verdicts = verify(logits, segments)
    counts = np.bincount([v.token for v in verdicts if v.num_accepted == 0], minlength=4)
    assert counts[1] == 0
    expected = np.array([0.5, 0.1, 0.1]) / 0.7 * counts.sum()  # max(p - q, 0) at ids 0, 2, 3
    assert ((counts[[0, 2, 3]] - expected) ** 2 / expected).sum() < 40
    rate = sum(v.num_accepted for v in verdicts) / 20_000
    assert abs(rate - 0.2 / 0.9) < 0.02


def test_a_greedy_target_replaces_a_drawn_proposal_by_its_argmax() -> None:
    rows = _rows(SamplingParams(temperature=0.0, draft_temperature=1.0), 50)
    logits = _logits(50)
    tokens, ids, probs = propose(_logits(50, seed=1), rows)
    segments = [Segment((r,), (tokens[i],), True, ids[i : i + 1], probs[i : i + 1]) for i, r in enumerate(rows)]
    best = logits.argmax(-1).tolist()
    for verdict, token, own in zip(verify(logits, segments), tokens, best, strict=True):
        assert verdict == (Verdict(1, -1) if token == own else Verdict(0, own))


def test_a_token_without_a_proposal_is_the_coupled_one_under_both_rules() -> None:
    rows, logits = _rows(SamplingParams(temperature=0.9, top_p=0.9), 1), _logits(1)
    own = coupled_tokens(logits, rows)[0]
    assert verify(logits, [Segment(rows, (), r) for r in (False,)]) == [Verdict(0, own)]
    assert verify(logits, [Segment(rows, (), True)]) == [Verdict(0, own)]


def test_a_perfect_draft_passes_every_test() -> None:
    params = SamplingParams(temperature=1.3, top_k=20)
    rows, logits = _rows(params, 200), _logits(200)
    tokens, ids, probs = propose(logits, rows)
    assert verify(logits, [Segment(rows, tuple(tokens), True, ids, probs)])[0].num_accepted == 200


def test_rows_behind_the_first_failure_are_never_looked_at() -> None:
    for rejection in (False, True):
        rows, logits = _rows(SamplingParams(), 5), _logits(5)
        wrong = (coupled_tokens(logits[:1], rows[:1])[0] + 1) % VOCAB
        ids, probs = np.zeros((5, 64), np.int32), np.zeros((5, 64), np.float32)  # q = 0 = p of a padded id
        segment = Segment(rows, (VOCAB if rejection else wrong, 1, 2, 3, 4), rejection, ids, probs)
        verdict = verify(logits, [segment])
        logits[1:] = torch.nan
        assert verify(logits, [segment]) == verdict and verdict[0].num_accepted == 0


def _mixed_segments(dtype: torch.dtype) -> tuple[torch.Tensor, list[Segment]]:
    kinds = [
        GREEDY,
        SamplingParams(temperature=0.0, repetition_penalty=1.4, top_k=3),
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(temperature=1.5, min_p=0.05, logit_bias={2: 3.0}),
        SamplingParams(temperature=0.8, frequency_penalty=0.4, draft_temperature=0.2),
    ]
    segments: list[Segment] = []
    target = []
    for n in range(48):
        params, rejection, length, extra = kinds[n % 6], n % 4 >= 2, n % 5, n % 2
        rows = _rows(params, max(length + extra, 1), seed=n)
        logits = _logits(len(rows), seed=n, dtype=dtype)
        near = logits.float() + 0.5 * _logits(len(rows), seed=1000 + n)
        tokens, ids, probs = propose(near, rows, num_valid=27)
        if not rejection:
            tokens = coupled_tokens(near, rows, draft=True, num_valid=27)
        given = (ids[:length], probs[:length]) if rejection else (None, None)
        segments.append(Segment(rows, tuple(tokens[:length]), rejection, *given))
        target.append(logits)
    return torch.cat(target), segments


def test_each_segment_of_a_mixed_batch_is_judged_as_alone() -> None:
    logits, segments = _mixed_segments(torch.float32)
    verdicts = verify(logits, segments, num_valid=27)
    start = 0
    for segment, verdict in zip(segments, verdicts, strict=True):
        stop = start + len(segment.rows)
        assert verify(logits[start:stop], [segment], num_valid=27) == [verdict]
        assert (verdict.token == -1) == (verdict.num_accepted == len(segment.rows))
        start = stop
    accepted = [v.num_accepted for v in verdicts]
    assert 0 in accepted and max(accepted) >= 3, "the batch should hold early failures and full acceptances"


@pytest.mark.parametrize("sizes", [(30,), (15, 15), (5, 5, 4, 4, 4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shards_give_the_verdicts_of_one_rank_on_every_rank(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, segments = _mixed_segments(dtype)
    expected = verify(logits, segments, num_valid=27)
    parts = logits.split(list(sizes), dim=1)
    answers = on_ranks(len(sizes), lambda g: verify_sharded(parts[g.rank], segments, g, sizes, num_valid=27))
    assert answers == [expected] * len(sizes)


def test_a_malformed_segment_is_refused() -> None:
    rows = _rows(GREEDY, 2)
    for bad in ((rows, ()), (rows, (1, 2, 3)), ((), ()), (rows, (1, 2), True)):
        with pytest.raises(AssertionError):
            Segment(*bad)
