"""The choice of windows: what the formulas say, what costs do to it, and that hopeless sequences stop drafting."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise

import pytest

from pearl_ray.core.costs import FORGET_ROUNDS, RoundCosts, StepCosts
from pearl_ray.core.phases import Node, Round, SequenceState, transition
from pearl_ray.core.windows import (
    MAX_WINDOW,
    MOST_PROBE_ROUNDS,
    PROBE_ROUNDS,
    PROBE_WINDOW,
    PROBED_ROUNDS,
    Acceptance,
    WindowPolicy,
    pearl_tokens_per_forward,
    sd_tokens_per_forward,
)

FLAT = {1: 10.0, 128: 10.0}
COSTLY = {1: 10.0, 2: 20.0, 4: 40.0, 128: 1280.0}
DRAFT = {1: 1.0, 128: 1.0}


def seen(rate: float, tests: int = 80) -> Acceptance:
    acceptance = Acceptance()
    for i in range(tests):
        acceptance.observe(1, int((i + 1) * rate) - int(i * rate))
    return acceptance


@pytest.mark.parametrize(("alpha", "gamma"), [(0.755, 8), (0.5, 4), (0.9, 3), (0.3, 2)])
def test_the_closed_form_is_what_the_transition_does_on_average(alpha, gamma):
    draw = random.Random(1)
    state = SequenceState(1, 2, 10**9, gamma, target_kv=1, draft_kv=1)
    forwards = 40_000
    for _ in range(forwards):
        drafted = (Node(0),) * gamma
        rows = len(state.pending) + 1
        accepted = next((i for i in range(rows) if draw.random() > alpha), rows)
        fed = state.num_committed + len(state.pending) - state.draft_kv
        token = 0 if accepted < rows else -1
        state, _ = transition(state, Round(rows, fed, drafted, rows, accepted, token))
    assert (state.num_committed - 2) / forwards == pytest.approx(pearl_tokens_per_forward(alpha, gamma), rel=0.02)


def test_the_figure_of_the_design():
    assert pearl_tokens_per_forward(0.755, 8) == pytest.approx(2.21, abs=0.005)
    assert pearl_tokens_per_forward(1.0, 5) == 5 and sd_tokens_per_forward(1.0, 5) == 6
    assert pearl_tokens_per_forward(0.7, 1) == pytest.approx(1.0)


def test_with_free_rows_the_window_is_what_fits_in_a_target_forward():
    for draft_s, expected in ((1.0, 10), (2.0, 5), (3.3, 3)):
        policy = WindowPolicy("pearl", None, StepCosts(FLAT, {1: draft_s}))
        window = policy.choose({0: seen(0.9)})[0]
        assert abs(window - expected) <= 1, (draft_s, window)


def test_rows_that_cost_their_full_price_end_speculation():
    policy = WindowPolicy("pearl", None, StepCosts(COSTLY, DRAFT))
    assert policy.choose(dict.fromkeys(range(8), seen(0.5))) == dict.fromkeys(range(8), 0)


def test_a_draft_as_slow_as_the_target_is_not_used():
    assert WindowPolicy("pearl", None, StepCosts(FLAT, {1: 10.0})).first_window(1) == 0
    assert WindowPolicy("sd", None, StepCosts(FLAT, {1: 10.0})).first_window(1) == 0


def test_hopeful_sequences_keep_their_windows_where_rows_are_dear():
    costs = StepCosts({1: 10.0, 64: 10.0, 128: 40.0, 256: 100.0}, DRAFT)
    policy = WindowPolicy("pearl", None, costs)
    sequences = {i: seen(0.95 if i < 8 else 0.1) for i in range(48)}
    windows = policy.choose(sequences)
    # 64 rows are free, 40 of them taken by the hopeless: 24 are left for 8 windows, and one more would cost
    assert min(windows[i] for i in range(8)) == 3
    assert max(windows[i] for i in range(8, 48)) < min(windows[i] for i in range(8))


def test_a_sequence_without_a_window_is_probed_again():
    policy = WindowPolicy("pearl", None, StepCosts(COSTLY, DRAFT))
    hopeless = seen(0.05)
    probed = 0
    for _ in range(3 * PROBE_ROUNDS):
        window = policy.choose({0: hopeless})[0]
        probed += window > 0
        policy.observe(hopeless, min(window, 1), 0)
    assert 2 <= probed <= 3 * 8


def test_where_nobody_drafts_some_are_probed_together_and_ever_more_seldom():
    """A round in which one drafts is as dear as one in which several do."""
    policy = WindowPolicy("pearl", None, StepCosts(FLAT, {1: 6.0, 32: 6.0}), shares_device=True)
    sequences = {i: seen(0.5) for i in range(32)}
    probes: list[int] = []
    for number in range(1, 1000):
        windows = policy.choose(sequences)
        drafting = [seq_id for seq_id, window in windows.items() if window]
        assert set(windows.values()) <= {0, PROBE_WINDOW}
        if drafting:
            probes.append(number)
            assert len(drafting) == 32 if len(probes) <= PROBED_ROUNDS else 8 < len(drafting) <= 32
        for seq_id, sequence in sequences.items():
            policy.observe(sequence, windows[seq_id], 0)
    begun = [number for number in probes if number - 1 not in probes]
    assert len(probes) == PROBED_ROUNDS * len(begun)
    gaps = [after - before for before, after in pairwise(begun)]
    assert PROBE_ROUNDS <= begun[0] < 2 * PROBE_ROUNDS and len(begun) == 5
    assert all(1.7 * before < after < 2.3 * before for before, after in pairwise(gaps[:2]))
    assert all(MOST_PROBE_ROUNDS <= gap <= MOST_PROBE_ROUNDS + 2 * PROBED_ROUNDS for gap in gaps[1:])


@pytest.mark.parametrize("rounds_late", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_a_batch_that_has_fallen_to_ar_comes_back_when_its_text_gets_easier(batch, rounds_late):
    """A window takes effect some rounds after it was chosen: two more where rounds are queued ahead."""
    policy = WindowPolicy("pearl", None, StepCosts(FLAT, {1: 2.0, 32: 2.0}), shares_device=True)
    sequences = {i: seen(0.05) for i in range(batch)}
    for _ in range(200):
        policy.observe_round(100, 5)
    on_their_way = deque([dict.fromkeys(sequences, 0)] * rounds_late)
    found = []
    for _ in range(900):
        on_their_way.append(dict(policy.choose(sequences)))
        windows = on_their_way.popleft()
        found.append(min(windows.values()))
        for seq_id, sequence in sequences.items():
            policy.observe(sequence, windows[seq_id], windows[seq_id])  # every token is right from now on
    assert set(found[:PROBE_ROUNDS]) == {0} and min(found[-100:]) > PROBE_WINDOW


def test_on_devices_of_their_own_each_hopeless_sequence_is_probed_in_its_own_time():
    """There a draft at work costs the target nothing."""
    policy = WindowPolicy("pearl", None, StepCosts(COSTLY, DRAFT))
    hopeless = {i: seen(0.05) for i in range(2)}
    probed: dict[int, int] = {0: 0, 1: 0}
    for number in range(6 * PROBE_ROUNDS):
        windows = policy.choose(hopeless)
        for seq_id, sequence in hopeless.items():
            probed[seq_id] += windows[seq_id] > 0
            policy.observe(sequence, windows[seq_id] if number > PROBE_ROUNDS / 2 or seq_id else 1, 0)
    assert min(probed.values()) >= 4


def test_a_fixed_window_and_ar_are_kept():
    assert WindowPolicy("pearl", 6, None).choose({1: seen(0.1), 2: seen(0.9)}) == {1: 6, 2: 6}
    assert WindowPolicy("ar", None, None).choose({1: seen(0.9)}) == {1: 0}
    assert WindowPolicy("sd", 3, None).first_window(5) == 3


def test_what_rounds_really_take_corrects_the_warm_up():
    policy = WindowPolicy("pearl", None, StepCosts(FLAT, {1: 1.0}))
    before = policy.first_window(1)
    for _ in range(200):
        policy.costs.observe_draft(1, 4, 16.0)  # four times as slow as measured
    assert policy.first_window(1) < before <= MAX_WINDOW
    assert policy.costs.one(1, 1, 32) == pytest.approx(128.0, rel=0.01)


def test_one_round_that_compiles_a_kernel_doesnt_end_speculation():
    policy = WindowPolicy("pearl", None, StepCosts(FLAT, {1: 1.0}))
    before = policy.first_window(1)
    policy.costs.observe_draft(1, 4, 4000.0)  # a thousand times as long as measured
    assert 0.75 * before <= policy.first_window(1) <= before
    policy.costs.observe_target(4, 10_000.0)
    assert policy.costs.one(1, 0, 0) <= 10.0 * 1.06


def test_on_a_shared_device_a_round_costs_what_both_cost():
    costs = StepCosts({1: 16.7, 8: 18.4, 64: 19.0}, {1: 0.9, 8: 1.2})
    alone, shared = (WindowPolicy("pearl", None, costs, shares_device=is_shared) for is_shared in (False, True))
    seconds = {w: costs.target(1) + w * costs.draft(1) for w in range(2, MAX_WINDOW + 1)}
    best = max(seconds, key=lambda w: pearl_tokens_per_forward(0.7, w) / seconds[w])
    assert abs(shared.first_window(1) - best) <= 1 and shared.first_window(1) < alone.first_window(1)


def test_on_a_shared_device_what_one_takes_in_a_round_is_the_others_work_too():
    policy = WindowPolicy("pearl", None, StepCosts(FLAT, {1: 1.0}), shares_device=True)
    before = policy.first_window(1)
    for _ in range(200):
        policy.costs.observe_draft(1, 4, 14.0)
        policy.costs.observe_target(4, 14.0)
    assert policy.first_window(1) == before > 0
    assert policy.costs.one(1, 1, 4) == pytest.approx(14.0)


def test_windows_too_wide_to_be_queued_ahead_cost_the_wait_that_was_seen():
    costs = StepCosts({1: 20.0, 512: 21.0}, {1: 1.0, 64: 1.5})
    policy = WindowPolicy("pearl", None, costs, ahead_rows=128)
    sequences = {i: seen(0.7) for i in range(32)}
    wide = sum(policy.choose(sequences).values())
    assert wide > 128
    policy.costs.observe_gap(128, 9.0)  # such a pass is queued ahead: the gap has another reason
    assert sum(policy.choose(dict(list(sequences.items())[:31])).values()) > 120
    policy.costs.observe_gap(wide, 9.0)
    assert 32 < sum(policy.choose(sequences).values()) <= 128
    alone = {0: seen(0.7)}
    assert policy.choose(alone) == WindowPolicy("pearl", None, costs).choose(alone)  # one is never too wide


@pytest.mark.parametrize("table", [{1: 3.0}, {1: 3.0, 4: 5.0, 8: 4.0}, {1: 3.0, 4: 4.0, 64: 30.0}])
def test_rounds_cost_what_the_tables_say_between_their_points_and_beyond_them(table):
    measured = StepCosts(table, {1: 0.0})
    costs = RoundCosts(measured, at_once=True)
    for rows in (1, 2, 3, 4, 6, 8, 9, 20, 64, 300):
        assert costs.one(rows, 1, 1) == pytest.approx(measured.target(rows), abs=1e-9)


def taking_turns(target_ms: float, sequences: int, steps: int) -> float:
    """Milliseconds on a device that two processes share: drafting costs two, and each step from the fifth on three."""
    turns = 2.0 * (steps > 0) + 3.0 * max(steps - 4, 0)
    return target_ms + steps * (0.7 + 0.05 * sequences) * 1.05 + turns


@pytest.mark.parametrize("target_ms", [16.5, 5.4])  # beside the latter two processes are slower than one
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.8, 0.9])
def test_on_a_shared_device_the_price_of_a_step_is_learnt_from_rounds(alpha, batch, target_ms):
    measured = StepCosts({1: target_ms, 128: target_ms}, {1: 0.75, 8: 1.1})
    policy = WindowPolicy("pearl", None, measured, shares_device=True, ahead_rows=128)
    sequences = {i: seen(alpha, 2000) for i in range(batch)}
    for sequence in sequences.values():
        for test in range(1000):
            policy.observe(sequence, 1, int((test + 1) * alpha) - int(test * alpha))

    def speed(window: int) -> float:
        return pearl_tokens_per_forward(alpha, window) / taking_turns(target_ms, batch if window else 0, window)

    best = max(speed(window) for window in (0, *range(2, MAX_WINDOW + 1)))
    found = []
    for _ in range(400):
        windows = set(policy.choose(sequences).values())
        assert len(windows) == 1
        window = windows.pop()
        found.append(speed(window))
        seconds = taking_turns(target_ms, batch, window)
        policy.costs.observe_round(batch * max(window, 1), batch if window else 0, window, seconds)
    assert sum(found[100:]) / 300 > 0.97 * best
    assert sum(one < 0.9 * best for one in found[100:]) <= 2 * PROBED_ROUNDS
    assert sum(found[:100]) / 100 > 0.93 * best


def test_what_many_steps_took_once_is_forgotten():
    costs = RoundCosts(StepCosts(FLAT, {1: 1.0}), at_once=True, shares_device=True)
    for _ in range(30):
        costs.observe_round(1, 1, 8, 36.0)  # twice the sum
    assert costs.one(1, 1, 8) == pytest.approx(36.0, rel=0.01)
    for _ in range(FORGET_ROUNDS):
        costs.observe_round(1, 1, 2, 12.0)
    assert costs.one(1, 1, 8) == pytest.approx(36.0, rel=0.01)
    costs.observe_round(1, 1, 2, 12.0)
    costs.observe_round(1, 1, 2, 12.0)
    assert costs.one(1, 1, 8) == pytest.approx(18.0)
