"""Rounds of plain rows of either rule through ``Verification``: the host's verdicts, and the target's distribution.

With torch in the kernels' place; ``tests/gpu`` has the same with the kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pearl_ray.core import verify
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Node, Proposal
from tests.distribution import Setting, exact_distribution, p_value
from tests.verification_machine import Member, counts_of, members, run

CPU = torch.device("cpu")
PLAIN = SamplingParams(temperature=1.0)
KINDS = [
    (PLAIN, True, 4),
    (PLAIN, False, 4),
    (SamplingParams(temperature=0.5, top_k=3), True, 8),
    (SamplingParams(temperature=2.0, top_p=0.75, draft_temperature=1.0), True, 1),
    (SamplingParams(temperature=0.0), True, 3),
    (SamplingParams(temperature=1.0, min_p=0.125), False, 2),
    (PLAIN, True, 0),
    (SamplingParams(temperature=1.5, top_k=4, top_p=0.5), True, 2),
    (PLAIN, False, 0),
]
ALONE = [(params, rule, width) for params, rule, width in KINDS if rule]
FALSE_ALARM = 1e-9
BROKEN = 1e-30


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("mode", ["pearl", "sd"])
@pytest.mark.parametrize("kinds", [ALONE, KINDS], ids=["rejection alone", "both rules"])
def test_verdicts_are_those_of_rounds_with_the_host_between(mode, kinds, is_ahead):
    num_rounds = 5
    batch = members(40, kinds)
    verification = run(batch, mode, CPU, num_rounds=num_rounds, is_ahead=is_ahead, with_host=True)
    assert verification.num_waits == num_rounds
    assert verification.num_advanced == (num_rounds - 1 if is_ahead and mode == "pearl" else 0)
    assert verification.num_filled == num_rounds - verification.num_advanced
    assert any(member.state.pending for member in batch) == (mode == "pearl")


def test_a_text_depends_neither_on_neighbours_nor_on_what_was_queued_ahead():
    together, in_turn = members(18, KINDS), members(18, KINDS)
    run(together, "pearl", CPU)
    run(in_turn, "pearl", CPU, is_ahead=False)
    assert [member.tokens for member in together] == [member.tokens for member in in_turn]
    for number, expected in enumerate(together[:9]):
        [alone] = members(18, KINDS)[number : number + 1]
        alone.blocks = [0]
        run([alone], "pearl", CPU)
        assert alone.tokens == expected.tokens


def p_of(mode: str, count: int, **options: object) -> float:
    batch = members(count, [(PLAIN, True, width) for width in (2, 3, 4)])
    run(batch, mode, CPU, **options)  # type: ignore[arg-type]
    return p_value(counts_of(batch), exact_distribution(Setting("plain", PLAIN)))


@pytest.mark.parametrize("count", [2500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_the_rejection_rule_keeps_the_targets_distribution(mode, count):
    assert p_of(mode, count) > FALSE_ALARM


def of_the_newest_window(_: Member, nodes: tuple[Node, ...], proposals: list[Proposal]) -> list[Proposal]:
    """Pending tokens tested by the proposals that have just come, as if a window overwrote the one before."""
    newest = [node.proposal for node in nodes if node.proposal is not None]
    return [newest[min(i, len(newest) - 1)] for i in range(len(proposals))]


def of_the_next_row(_: Member, nodes: tuple[Node, ...], proposals: list[Proposal]) -> list[Proposal]:
    return proposals[1:] + proposals[:1]


@pytest.mark.parametrize("tamper", [of_the_newest_window, of_the_next_row])
def test_another_rounds_or_rows_proposals_would_be_seen(tamper):
    assert p_of("pearl", count=2000, tamper=tamper) < BROKEN


def test_a_residual_without_the_proposal_would_be_seen(monkeypatch):
    right = verify._residual_tokens
    monkeypatch.setattr(verify, "_residual_tokens", lambda p, ids, q, rows: right(p, ids, np.zeros_like(q), rows))
    assert p_of("pearl", count=2000) < BROKEN


@pytest.mark.parametrize("wrong", [[], "too many"])
def test_a_tested_token_without_its_proposal_is_no_verdict(wrong):
    def tamper(_: Member, nodes: tuple[Node, ...], proposals: list[Proposal]) -> list[Proposal]:
        return proposals * 2 if wrong else []

    with pytest.raises(AssertionError, match="proposal"):
        run(members(3, ALONE), "pearl", CPU, tamper=tamper)
