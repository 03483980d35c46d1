"""The device's sampler gives the tokens, proposals and verdicts of the host's, alone and over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernel_checks import CAN_RUN, DEVICE, INTERPRETING, REASON

pytest.importorskip("triton")

from pearl_ray.core.comm import SingleGroup
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.sampling import Row
from pearl_ray.core.verify import Segment
from pearl_ray.kernels.sampler import TorchSampler, draws_of, judge_segments
from pearl_ray.kernels.sampler_triton import TritonSampler
from tests.distribution import PADDED, VOCAB
from tests.thread_group import on_ranks
from tests.verification_machine import members, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

SIZES = {1: [500], 3: [170, 169, 161]}
RANKS = [1] if INTERPRETING else [1, 3]  # ranks are threads, and the interpreter keeps its state in globals
NUM_VALID = 493
PARAMS = {
    "greedy": [SamplingParams(temperature=0.0)],
    "hot": [SamplingParams(temperature=1.0), SamplingParams(temperature=0.5)],
    "mixed": [
        SamplingParams(temperature=0.0, top_k=3),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=0.5, top_p=0.75),
        SamplingParams(temperature=2.0, min_p=0.125, top_k=40, top_p=0.5),
        SamplingParams(temperature=1.0),
    ],
}


def rows_of(kind: str, count: int) -> list[Row]:
    params = PARAMS[kind]
    return [Row(params[i % len(params)], 2**63 + 977 * i, i % 3, 40 + i) for i in range(count)]


def sharded(function, logits: torch.Tensor, ranks: int):
    """``function(sampler, this rank's logits)`` on every rank; all must agree."""
    ends = np.cumsum(SIZES[ranks]).tolist()

    def one(group):
        local = logits[:, ends[group.rank] - SIZES[ranks][group.rank] : ends[group.rank]].contiguous()
        return function(TritonSampler(group, SIZES[ranks], NUM_VALID), local)

    results = [one(SingleGroup())] if ranks == 1 else on_ranks(ranks, one)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return [tensor.cpu() for tensor in results[0]]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", list(PARAMS))
def test_drawn_tokens_are_the_hosts(kind, ranks):
    rows = rows_of(kind, 9)
    logits = (torch.randn(9, 500, device=DEVICE) * 2).float()
    expected = TorchSampler(SingleGroup(), [500], NUM_VALID).draw(logits.cpu(), draws_of(rows, torch.device("cpu")))
    [found] = sharded(lambda sampler, local: [sampler.draw(local, draws_of(rows, DEVICE))], logits, ranks)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ["hot", "mixed"])
def test_proposals_are_the_hosts(kind, ranks):
    rows = rows_of(kind, 5)
    logits = (torch.randn(5, 500, device=DEVICE) * 2).float()
    tokens, ids, probs = TorchSampler(SingleGroup(), [500], NUM_VALID).propose(
        logits.cpu(), draws_of(rows, torch.device("cpu"))
    )
    found = sharded(lambda sampler, local: sampler.propose(local, draws_of(rows, DEVICE)), logits, ranks)
    assert found[0].tolist() == tokens.tolist() and found[1].tolist() == ids.tolist()
    torch.testing.assert_close(found[2], probs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_rounds_through_the_kernels_give_the_hosts_text(mode):
    """``Verification`` and all behind it, rules mixed; in PEARL the rounds are queued ahead."""
    kinds = [(params, i % 3 > 0, 1 + i % 4) for i, params in enumerate(PARAMS["mixed"])]
    found, expected = members(5, kinds), members(5, kinds)
    sampler = TritonSampler(SingleGroup(), [PADDED], VOCAB)
    verification = run(found, mode, DEVICE, num_rounds=3, with_host=True, sampler=sampler)
    assert verification.num_waits == 3 and verification.num_advanced == (2 if mode == "pearl" else 0)
    run(expected, mode, torch.device("cpu"), num_rounds=3)
    assert [member.tokens for member in found] == [member.tokens for member in expected]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("has_rejection", [False, True])
@pytest.mark.parametrize("kind", list(PARAMS))
def test_verdicts_are_the_hosts(kind, has_rejection, ranks):
    counts = [1, 4, 2, 3, 1]
    rows = rows_of(kind, sum(counts))
    logits = (torch.randn(len(rows), 500, device=DEVICE) * 2).float()
    own = TorchSampler(SingleGroup(), [500], NUM_VALID).draw(logits.cpu(), draws_of(rows, torch.device("cpu"))).tolist()
    segments, at = [], 0
    for index, count in enumerate(counts):
        tested = tuple(own[at + i] if i < index else (own[at + i] + 1) % NUM_VALID for i in range(count - index % 2))
        rejection = has_rejection and index % 2 == 1
        ids = probs = None
        if rejection and tested:
            ids = np.stack([(np.arange(64) + token) % NUM_VALID for token in tested]).astype(np.int32)
            probs = np.full(ids.shape, 1 / 64, np.float32)
        segments.append(Segment(tuple(rows[at : at + count]), tested, rejection, ids, probs))
        at += count
    expected = judge_segments(TorchSampler(SingleGroup(), [500], NUM_VALID), logits.cpu(), segments)
    found = sharded(lambda sampler, local: judge_segments(sampler, local, segments), logits, ranks)
    assert [tensor.tolist() for tensor in found] == [tensor.tolist() for tensor in expected]
