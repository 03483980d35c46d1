"""The replay that windows are judged by does rounds as the engine's own algorithm does, and charges what they take."""

from __future__ import annotations

import random

import pytest

from benchmarks.main_job import replayed_forwards
from benchmarks.windows import MACHINES, NUM_PROMPT, Text, replay
from pearl_ray.core.phases import SequenceState


def agreeing(rate: float, count: int, seed: int) -> list[bool]:
    draw = random.Random(seed)
    return [draw.random() < rate for _ in range(count)]


@pytest.mark.parametrize("window", [2, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_a_text_takes_as_many_rounds_as_where_the_engine_is_checked(window, seed):
    agrees = agreeing(0.7, 90, seed)
    total = NUM_PROMPT + len(agrees)
    text = Text(agrees, SequenceState(NUM_PROMPT, NUM_PROMPT + 1, total, 0, (), NUM_PROMPT))
    rounds = 0
    while not text.state.is_full:
        text.step(min(window, total - text.state.num_committed - len(text.state.pending)))
        rounds += 1
    assert rounds == replayed_forwards(NUM_PROMPT, agrees, window=window)


def test_ar_takes_a_target_forward_per_token_and_the_policy_is_near_the_best_window():
    traces = [agreeing(rate, 100, seed) for seed, rate in enumerate([0.5, 0.6, 0.7, 0.8])]
    for machine, (costs, _, _) in MACHINES.items():
        ar = replay(traces, 1, machine, 0)
        assert ar == pytest.approx(1000 / costs.target(1))
        best = max(replay(traces, 1, machine, window) for window in (0, 4, 8, 16))
        assert replay(traces, 1, machine, None) > 0.9 * best
