"""Sampling of rows: the order of the adjustments, exact cuts, ties, temperatures, shards, and the draft's proposals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pearl_ray.core.params import SamplingParams
from pearl_ray.core.rng import Purpose, gumbel
from pearl_ray.core.sampling import (
    Row,
    adjusted_logits,
    coupled_tokens,
    coupled_tokens_sharded,
    distributions,
    filtered_scores,
    propose,
    target_distribution,
)
from tests.thread_group import on_ranks

VOCAB = 50
VARIED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, top_p=0.5, repetition_penalty=1.3),
    SamplingParams(),
    SamplingParams(temperature=0.3, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=5.0, top_k=7),
    SamplingParams(temperature=1.2, top_p=0.9, draft_temperature=0.4),
    SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=0.8),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.7, min_p=0.01, logit_bias={3: 4.0, 49: -3.0}),
    SamplingParams(draft_temperature=0.0, logit_bias={48: 9.0}),
]


def _row(params: SamplingParams | None = None, **fields: object) -> Row:
    return Row(params or SamplingParams(), **{"seed": 5, "sample_index": 0, "position": 9, **fields})  # type: ignore[arg-type]


def _rows(generator: np.random.Generator, count: int = 27) -> list[Row]:
    rows = []
    for i in range(count):
        allowed = torch.from_numpy(generator.random(VOCAB) < 0.8) if i % 4 == 1 else None
        prompt, output = generator.integers(0, VOCAB, 6).tolist(), generator.integers(0, VOCAB, i).tolist()
        masked = (1, 7, 48) if i % 3 == 0 else ()
        rows.append(Row(VARIED[i % len(VARIED)], i * 2**40 - 3, i % 2, 30 + i, prompt, output, masked, allowed))
    return rows


def _logits(count: int, dtype: torch.dtype = torch.float32, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return (torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def test_penalties_are_vllms_and_bias_and_masks_follow() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={0: 1.0, 4: -2.0}
    )
    logits = torch.tensor([[4.0, -4.0, 3.0, -3.0, 1.0, 5.0]])
    allowed = torch.tensor([True, True, True, True, True, False])
    row = _row(params, prompt=(0, 1, 1), output=(2, 3, 2, 99), masked=(1,), allowed=allowed)
    expected = [4 / 2 + 1.0, -math.inf, 3 / 2 - 2 * 0.5 - 0.25, -3 * 2 - 0.5 - 0.25, 1.0 - 2.0, -math.inf]
    assert adjusted_logits(logits, [row])[0].tolist() == expected
    assert logits[0, 0] == 4.0, "the caller's logits are not written to"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_slice_of_the_vocabulary_is_adjusted_as_the_whole(dtype: torch.dtype) -> None:
    rows = _rows(np.random.default_rng(0))
    logits = _logits(len(rows), dtype)
    before = logits.clone()
    whole = adjusted_logits(logits, rows)
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for start, stop in ((0, 13), (13, 40), (40, 50)):
        assert torch.equal(adjusted_logits(logits[:, start:stop], rows, vocab_start=start), whole[:, start:stop])
    assert torch.equal(logits, before)


def test_filters_cut_exactly_where_scores_tie_and_keep_the_lowest_ids() -> None:
    def kept(logits: list[float], **params: float) -> list[int]:
        row = _row(SamplingParams(**params))  # type: ignore[arg-type]
        return filtered_scores(torch.tensor([logits]), [row])[0].isfinite().nonzero()[:, 0].tolist()

    assert kept([0.0, 2.0, 2.0, 2.0, 1.0], top_k=2) == [1, 2]
    assert kept([0.0] * 4, top_p=0.5) == [0, 1]
    assert kept([0.0] * 4, top_p=0.51) == [0, 1, 2]
    assert kept([0.0] * 4, top_k=3, top_p=0.6) == [0, 1], "top-p counts within what top-k left: 1/3 + 1/3 >= 0.6"
    assert kept([0.0, 0.0, -5.0, 0.0], min_p=1.0) == [0, 1, 3]
    assert kept([3.0, 1.0, 0.0], top_p=1e-9) == [0]
    assert kept([0.0, math.log(2), math.log(4)], min_p=0.49, temperature=2.0) == [0, 1, 2]
    assert kept([0.0, math.log(2), math.log(4)], min_p=0.49) == [1, 2]
    assert kept([0.0, 1.0, 2.0], top_k=1, temperature=0.0) == [0, 1, 2], "greedy rows aren't cut"


def test_top_p_is_exact_beyond_the_depth_that_it_sorts_first() -> None:
    logits = _logits(3, vocab=5000) * 0.1
    params = [SamplingParams(top_p=0.9), SamplingParams(top_p=0.1), SamplingParams(top_k=2500, top_p=0.95)]
    support = filtered_scores(logits, [_row(p) for p in params]).isfinite()
    for x, p, kept in zip(logits.double(), params, support, strict=True):
        order = x.argsort(descending=True, stable=True)[: p.top_k or 5000]
        mass = x[order].softmax(0)
        count = int(((mass.cumsum(0) - mass) < p.top_p).sum())
        assert sorted(order[:count].tolist()) == kept.nonzero()[:, 0].tolist()


def test_temperatures_that_differ_widely_give_normalised_distributions() -> None:
    logits = _logits(6)
    rows = [_row(SamplingParams(temperature=t)) for t in (0.0, 1e-40, 1e-6, 0.5, 1.0, 100.0)]
    p = distributions(logits, rows)
    assert p.dtype == torch.float32 and torch.allclose(p.sum(-1), torch.ones(6))
    for i in range(3):
        assert p[i].max() == 1.0 and p[i].argmax() == logits[i].argmax()
    for i, t in ((3, 0.5), (4, 1.0), (5, 100.0)):
        assert torch.allclose(p[i].double(), (logits[i].double() / t).softmax(0), rtol=2e-6, atol=0)


def test_each_row_of_a_batch_is_answered_as_alone() -> None:
    rows = _rows(np.random.default_rng(1))
    for vocab, rows_used in ((VOCAB, rows), (3000, [replace(r, allowed=None) for r in rows])):
        logits = _logits(len(rows), vocab=vocab)
        p, tokens = distributions(logits, rows_used), coupled_tokens(logits, rows_used)
        for i, row in enumerate(rows_used):
            assert torch.equal(target_distribution(logits[i], row), p[i])
            assert coupled_tokens(logits[i : i + 1], [row]) == [tokens[i]]


def test_the_coupled_token_is_the_argmax_of_logit_plus_noise_and_greedy_ties_go_to_the_lowest_id() -> None:
    logits = _logits(4)
    rows = [_row(SamplingParams(temperature=t), position=i) for i, t in enumerate((0.0, 0.4, 1.0, 3.0))]
    noise = gumbel([5] * 4, range(4), [0] * 4, Purpose.COUPLED, vocab_start=0, vocab_size=VOCAB)
    expected = (logits + torch.tensor([[0.0], [0.4], [1.0], [3.0]]) * noise).argmax(-1)
    assert coupled_tokens(logits, rows) == expected.tolist()
    assert coupled_tokens(torch.tensor([[1.0, 7.0, 7.0, 7.0]]), [rows[0]]) == [1]


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skipping_the_noise_of_ids_that_cannot_win_changes_no_token(temperature: float, dtype: torch.dtype) -> None:
    logits = _logits(60, dtype, vocab=70_000)  # longer than a chunk: one row at a time, with the shortcut
    rows = [_row(SamplingParams(temperature=temperature), position=i) for i in range(60)]
    at = torch.tensor(temperature, dtype=dtype)
    for i, token in enumerate(coupled_tokens(logits, rows)):
        noise = gumbel([5], [i], [0], Purpose.COUPLED, vocab_start=0, vocab_size=70_000)[0]
        assert token == int((logits[i] + at * noise).argmax())


def test_draft_and_target_agree_where_their_logits_do_and_the_draft_has_its_own_temperature() -> None:
    logits = _logits(200)
    rows = [_row(SamplingParams(draft_temperature=0.0), position=i) for i in range(200)]
    assert coupled_tokens(logits, rows, draft=True) == logits.argmax(-1).tolist()
    plain = [_row(position=i) for i in range(200)]
    assert coupled_tokens(logits, rows) == coupled_tokens(logits, plain) == coupled_tokens(logits, plain, draft=True)


def test_padded_ids_are_never_chosen_nor_counted() -> None:
    logits = _logits(len(VARIED))
    logits[:, 40:] = 50.0
    rows = [_row(p) for p in VARIED]
    short = logits[:, :40].contiguous()
    assert coupled_tokens(logits, rows, num_valid=40) == coupled_tokens(short, rows)
    p = distributions(logits, rows, num_valid=40)
    assert torch.equal(p[:, :40], distributions(short, rows)) and not p[:, 40:].any()
    tokens, ids, probs = propose(logits, rows, num_valid=40)
    assert max(tokens) < 40 and ids[probs > 0].max() < 40


@pytest.mark.parametrize("sizes", [(50,), (25, 25), (20, 3, 27), (10, 9, 8, 7, 6, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shards_choose_the_same_tokens_as_one_rank(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = _rows(np.random.default_rng(2), 40)
    logits = _logits(40, dtype)
    for draft, num_valid in ((False, None), (True, 44), (False, 19)):
        expected = coupled_tokens(logits, rows, draft=draft, num_valid=num_valid)
        parts = logits.split(list(sizes), dim=1)
        answers = on_ranks(
            len(sizes),
            lambda g, d=draft, n=num_valid, p=parts: coupled_tokens_sharded(
                p[g.rank], rows, g, sizes, draft=d, num_valid=n
            ),
        )
        assert answers == [expected] * len(sizes)


def test_shards_break_ties_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    row = _row(SamplingParams(temperature=0.0))
    parts = logits.split(2, dim=1)
    assert on_ranks(2, lambda g: coupled_tokens_sharded(parts[g.rank], [row], g, [2, 2])) == [[1], [1]]


def test_a_proposal_is_the_top_64_renormalised_and_the_draw_follows_those_very_numbers() -> None:
    logits = _logits(1, vocab=300)
    row = _row(SamplingParams(temperature=2.0))
    q = target_distribution(logits[0], row, draft=True)
    _, ids, probs = propose(logits, [row])
    assert ids.dtype == np.int32 and probs.dtype == np.float32 and ids.shape == probs.shape == (1, 64)
    assert ids[0].tolist() == q.argsort(descending=True, stable=True)[:64].tolist()
    top = q[torch.from_numpy(ids[0]).long()]
    assert np.allclose(probs[0], (top / top.sum()).numpy(), rtol=1e-6) and abs(probs.sum() - 1) < 1e-6
    rows = [_row(SamplingParams(temperature=2.0), position=i) for i in range(20_000)]
    tokens, _, _ = propose(logits.expand(20_000, -1), rows)
    counts = np.bincount(tokens, minlength=300)[ids[0]]
    assert counts.sum() == 20_000
    expected = probs[0].astype(np.float64) / probs[0].astype(np.float64).sum() * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * math.sqrt(2 * 63)


def test_a_greedy_proposal_is_one_entry_of_probability_one() -> None:
    logits = _logits(2)
    tokens, ids, probs = propose(logits, [_row(SamplingParams(temperature=0.0)), _row(VARIED[-1])])
    assert tokens[0] == int(logits[0].argmax()) and ids[:, 0].tolist() == tokens
    assert probs[:, 0].tolist() == [1.0, 1.0] and not probs[:, 1:].any() and not ids[:, 1:].any()


def test_a_proposal_with_a_tiny_vocabulary_or_filters_leaves_the_rest_empty() -> None:
    rows = [_row(SamplingParams(top_k=2)), _row()]
    tokens, ids, probs = propose(torch.tensor([[0.0, 3.0, 2.0, 2.0]] * 2), rows)
    assert ids[0, :2].tolist() == [1, 2] and not probs[0, 2:].any()
    assert ids[1, :4].tolist() == [1, 2, 3, 0] and tokens[0] in (1, 2)
