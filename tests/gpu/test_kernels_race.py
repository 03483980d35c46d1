"""The coupled rule on the device: the CPU's noise bit for bit, its tokens, verdicts, shards, and the distribution."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pearl_ray.core import rng
from pearl_ray.core.rng import Purpose
from pearl_ray.kernels import noise
from pearl_ray.kernels.race import Draws, judge, race, race_reference, reduce
from tests.kernel_checks import CAN_RUN, DEVICE, INTERPRETING, REASON, fresh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

VOCAB = 5003 if INTERPRETING else 151_937


def draws_of(rows: int, temperatures: list[float] | None = None) -> Draws:
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=DEVICE)
    heats = (temperatures or [1.0, 0.0, 0.3, 1.7]) * rows
    return Draws(
        seeds,
        torch.randint(0, 40_000, (rows,), dtype=torch.int32, device=DEVICE),
        torch.randint(0, 4, (rows,), dtype=torch.int32, device=DEVICE),
        torch.tensor(heats[:rows], device=DEVICE),
    )


@pytest.mark.parametrize("purpose", list(Purpose))
@pytest.mark.parametrize(("start", "size"), [(0, 1001), (255, 250), (5, 3), (32_766, 4099)])
def test_the_noise_has_the_references_bits(start: int, size: int, purpose: Purpose) -> None:
    seeds, positions, samples = [1, -5, 2**64 - 1, 2**63 + 12345], [0, 77, 40_000, 2**20], [0, 3, 1, 2]
    signed = torch.tensor([(s + 2**63) % 2**64 - 2**63 for s in seeds], device=DEVICE)
    on_device = noise.gumbel(
        signed,
        torch.tensor(positions, device=DEVICE),
        torch.tensor(samples, dtype=torch.int32, device=DEVICE),
        int(purpose),
        vocab_start=start,
        vocab_size=size,
    )
    expected = rng.gumbel(seeds, positions, samples, purpose, vocab_start=start, vocab_size=size)
    assert on_device.cpu().numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.skipif(INTERPRETING, reason="large")
def test_sixteen_million_numbers_have_the_references_bits() -> None:
    draws = draws_of(128)
    out = noise.gumbel(draws.seeds_R, draws.positions_R, draws.samples_R, 0, vocab_start=0, vocab_size=131_072).cpu()
    keys = (draws.seeds_R.tolist(), draws.positions_R.tolist(), draws.samples_R.tolist())
    assert torch.equal(out, rng.gumbel(*keys, 0, vocab_start=0, vocab_size=131_072))


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, torch.bfloat16])
def test_every_rows_token_and_score_are_the_references(dtype: torch.dtype) -> None:
    rows = 5 if INTERPRETING else 48
    logits, draws = fresh(rows, VOCAB + 5, scale=2.0, dtype=dtype)[:, :VOCAB], draws_of(rows)
    score, token = reduce(*race(logits, draws, num_valid=VOCAB - 7))
    best, expected = race_reference(logits, draws, num_valid=VOCAB - 7)
    assert torch.equal(token, expected) and torch.equal(score, best)
    assert int(token.max()) < VOCAB - 7


def test_equal_scores_go_to_the_lowest_id_and_padding_never_wins() -> None:
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    logits[1, 4999:] = 5.0
    logits[2] = -math.inf
    logits[2, 17] = -50.0
    _, token = reduce(*race(logits, draws_of(3, [0.0]), num_valid=VOCAB - 1))
    assert token[:, 0].tolist() == [0, 4999, 17]


def test_shards_of_any_start_give_the_whole_vocabularys_answer() -> None:
    logits, draws = fresh(4, VOCAB, scale=2.0), draws_of(4)
    whole = race_reference(logits, draws, num_valid=VOCAB - 3)
    parts, start = [], 0
    for size in (1000, 1, 2047, VOCAB - 3048 - 2, 2):
        part = logits[:, start : start + size].contiguous()
        parts.append(reduce(*race(part, draws, vocab_start=start, num_valid=VOCAB - 3)))
        start += size
    score, token = reduce(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1))
    assert torch.equal(token, whole[1]) and torch.equal(score, whole[0])


def verdicts(tokens: list[int], starts: list[int], tested: list[int]) -> list[tuple[int, int]]:
    """``core.verify``'s comparison, row by row."""
    out = []
    for begin, end in pairwise(starts):
        row = begin
        while row < end and tokens[row] == tested[row]:
            row += 1
        out.append((row - begin, tokens[row] if row < end else -1))
    return out


def test_verdicts_are_the_references_for_every_length_of_agreement() -> None:
    starts = [0, 1, 1, 4, 9, 14, 22]
    logits, draws = fresh(22, 2500, scale=2.0), draws_of(22)
    best, ids = race(logits, draws)
    own = reduce(best, ids)[1][:, 0].tolist()
    for agree in range(9):
        tested = list(own)
        for begin, end in pairwise(starts):
            if begin + agree < end:
                tested[begin + agree] = own[begin + agree] + 1 if agree % 2 else -1
        row_start = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        accepted, token, row_token = judge(best, ids, row_start, torch.tensor(tested, device=DEVICE), 8)
        assert list(zip(accepted.tolist(), token.tolist(), strict=True)) == verdicts(own, starts, tested)
        assert row_token.tolist() == own


def test_a_window_of_sixty_four_rows_is_judged() -> None:
    logits, draws = fresh(64, 101, scale=2.0), draws_of(64)
    best, ids = race(logits, draws)
    own = reduce(best, ids)[1][:, 0]
    row_start = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
    accepted, token, _ = judge(best, ids, row_start, own, 64)
    assert (accepted.tolist(), token.tolist()) == ([64], [-1])


@pytest.mark.skipif(INTERPRETING, reason="many draws")
def test_tokens_follow_the_softmax() -> None:
    count = 200_000
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 0.0, 1.5, 0.2], device=DEVICE)
    draws = Draws(
        torch.randint(-(2**63), 2**63 - 1, (count,), device=DEVICE),
        torch.arange(count, dtype=torch.int32, device=DEVICE),
        torch.zeros(count, dtype=torch.int32, device=DEVICE),
        torch.full((count,), 0.7, device=DEVICE),
    )
    _, token = reduce(*race(logits.expand(count, -1).contiguous(), draws))
    seen = np.bincount(token[:, 0].cpu().numpy(), minlength=9)
    expected = (logits.double() / 0.7).softmax(0).cpu().numpy() * count
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 40.0  # 8 degrees of freedom: one in 300,000
