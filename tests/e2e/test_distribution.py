"""Losslessness by chi-square: both rules, every mode, every kind of parameter; and broken twins that it catches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pearl_ray.core.params import SamplingParams
from pearl_ray.core.sampling import distributions
from pearl_ray.core.verify import Segment, Verdict, verify
from tests.distribution import VOCAB, Draw, Machine, Setting, counts_of, draws_of, exact_distribution, p_value

pytestmark = pytest.mark.timeout(1200)  # the first draws for all others: minutes on a loaded machine

FALSE_ALARM = 1e-9  # per comparison; there are fewer than a hundred
BROKEN = 1e-30
DRAWS = 20_000
GRAMMAR = tuple(torch.tensor([(row + 2 * v) % 5 != 0 for v in range(VOCAB)]) for row in range(VOCAB))
PENALTIES = Setting(
    "penalties and filters",
    SamplingParams(
        temperature=1.2,
        top_k=5,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.5,
        frequency_penalty=0.7,
        presence_penalty=-0.4,
    ),
)
SETTINGS = [
    Setting("plain", SamplingParams()),
    Setting("greedy draft", SamplingParams(temperature=0.8, draft_temperature=0.0)),
    Setting("top-k, cool draft", SamplingParams(temperature=1.3, draft_temperature=0.4, top_k=3)),
    Setting("top-p", SamplingParams(temperature=0.9, top_p=0.8)),
    PENALTIES,
    Setting("bias, min_tokens, grammar", SamplingParams(min_tokens=2, logit_bias={0: 1.5, 3: -2.0}), (0, 5), GRAMMAR),
]
PLAIN = SETTINGS[0]
GREEDY = Setting("greedy", SamplingParams(temperature=0.0, repetition_penalty=1.2, draft_temperature=1.0))


def _flaky() -> Machine:
    """The draft dies for a round now and then, and its pending tokens are tested, or dropped without a look."""
    return Machine("pearl", lambda n, i: (n + i // 3) % 4, drops=lambda n, i: (n + i // 7) % 3 == 0)


MACHINES = {
    "pearl": lambda: Machine("pearl"),
    "pearl, flaky draft": _flaky,
    "sd": lambda: Machine("sd"),
    "ar": lambda: Machine("ar"),
}


@functools.cache
def _outputs(machine: str) -> list[Draw]:
    """All settings and both rules mixed in one batch."""
    draws = draws_of(_settings(machine), (False, True), DRAWS, engine_seed=len(machine))
    MACHINES[machine]().run(draws)
    return draws


def _settings(machine: str) -> list[Setting]:
    return SETTINGS if machine == "pearl" else [PENALTIES]


CASES = [(m, s, r) for m in MACHINES for s in _settings(m) for r in (False, True)]


@pytest.mark.parametrize(
    ("machine", "setting", "rejection"),
    CASES,
    ids=[f"{m}-{s.name}-{'rejection' if r else 'coupled'}" for m, s, r in CASES],
)
def test_the_next_three_tokens_follow_the_targets_own_distribution(
    machine: str, setting: Setting, rejection: bool
) -> None:
    counts = counts_of(_outputs(machine), setting, rejection)
    assert counts.sum() == DRAWS
    assert p_value(counts, exact_distribution(setting)) > FALSE_ALARM


@pytest.mark.parametrize("machine", MACHINES)
def test_greedy_text_is_the_targets_likeliest_under_both_rules(machine: str) -> None:
    draws = draws_of([GREEDY, PLAIN], (False, True), 50)
    MACHINES[machine]().run(draws)
    for rejection in (False, True):
        assert p_value(counts_of(draws, GREEDY, rejection), exact_distribution(GREEDY)) == 1.0


def test_coupled_text_is_the_same_in_every_mode_window_and_mishap_at_every_temperature() -> None:
    texts = []
    for machine in MACHINES.values():
        draws = draws_of([*SETTINGS, GREEDY], (False,), 200, engine_seed=5)
        machine().run(draws)
        texts.append([d.output[:3] for d in draws])
    assert all(text == texts[0] for text in texts)


def test_rejection_text_does_not_depend_on_the_window_or_on_dropped_drafts() -> None:
    machines = [Machine("pearl", lambda n, i, w=w: w) for w in (1, 2, 3, 4)]
    machines.append(Machine("pearl", drops=lambda n, i: (n + i) % 2 == 0))
    texts = []
    for machine in machines:
        draws = draws_of([*SETTINGS, GREEDY], (True,), 200, engine_seed=5)
        machine.run(draws)
        texts.append([d.output[:3] for d in draws])
    assert all(text == texts[0] for text in texts)


# -- broken twins: each differs from the truth in one line, and the same chi-square must see it ---------------------


def _judged(logits: torch.Tensor, segments: Sequence[Segment]) -> list[Verdict]:
    return verify(logits, segments, num_valid=VOCAB)


def _accept_always(logits: torch.Tensor, segments: Sequence[Segment]) -> list[Verdict]:
    return [Verdict(len(s.tested), -1) for s in segments]


def _residual_is_p(logits: torch.Tensor, segments: Sequence[Segment]) -> list[Verdict]:
    judged = _judged(logits, segments)
    from_p = iter(_redraw(logits, segments, judged, lambda x, some: _judged(x, some)))
    return [Verdict(v.num_accepted, next(from_p).token) if v.token >= 0 else v for v in judged]


def _replacement_drawn_afresh(logits: torch.Tensor, segments: Sequence[Segment]) -> list[Verdict]:
    noise = np.random.default_rng(len(segments))

    def afresh(x: torch.Tensor, some: Sequence[Segment]) -> list[Verdict]:
        p = distributions(x, [s.rows[0] for s in some], num_valid=VOCAB).double().numpy()
        below = p.cumsum(-1) < noise.random((len(p), 1)) * p.sum(-1, keepdims=True)
        return [Verdict(0, t) for t in below.sum(-1).tolist()]

    judged = _judged(logits, segments)
    fresh = iter(_redraw(logits, segments, judged, afresh))
    return [Verdict(v.num_accepted, next(fresh).token) if v.token >= 0 else v for v in judged]


def _redraw(logits, segments, judged, draw):  # type: ignore[no-untyped-def]
    """``draw`` on the row at which each failing segment fails, alone and untested."""
    starts = np.cumsum([0] + [len(s.rows) for s in segments])
    failed = [i for i, v in enumerate(judged) if v.token >= 0]
    some = [Segment((segments[i].rows[judged[i].num_accepted],), ()) for i in failed]
    return draw(logits[[int(starts[i]) + judged[i].num_accepted for i in failed]], some) if failed else []


def _same_noise_for_two(position: int) -> int:
    return position - position % 2


TWINS = {
    "rejection: accept always": (True, Machine("pearl", judge=_accept_always)),
    "rejection: residual = p": (True, Machine("pearl", judge=_residual_is_p)),
    "rejection: noise reused at the next position": (True, Machine("pearl", position=_same_noise_for_two)),
    "coupled: noise reused at the next position": (False, Machine("pearl", position=_same_noise_for_two)),
    "coupled: replacement drawn afresh": (False, Machine("pearl", judge=_replacement_drawn_afresh)),
}


@pytest.mark.parametrize("twin", TWINS)
def test_the_same_test_sees_a_rule_broken_on_purpose(twin: str) -> None:
    rejection, machine = TWINS[twin]
    draws = draws_of([PLAIN], (rejection,), DRAWS)
    machine.run(draws)
    assert p_value(counts_of(draws, PLAIN, rejection), exact_distribution(PLAIN)) < BROKEN


def test_the_chi_square_sees_a_temperature_that_is_off_by_15_percent() -> None:
    wrong = replace(PLAIN, params=SamplingParams(temperature=1.15))
    draws = draws_of([PLAIN], (False,), DRAWS)
    Machine("ar").run(draws)
    assert p_value(counts_of(draws, PLAIN, False), exact_distribution(wrong)) < BROKEN
