"""The rounds that GPUs run, with torch in the kernels' place: the same text as the host's rounds, with fewer waits.

Float64, no exception excused, but for temperatures: the device holds them as float32, so those here are exact in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pearl_ray.actors import device_target
from pearl_ray.actors.device import profile, warm_up_rejection
from pearl_ray.actors.device_target import DeviceTargetLoop
from pearl_ray.core.costs import RoundCosts, StepCosts
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.core.schedule import RoundPlan
from pearl_ray.model.graphs import GraphPool
from pearl_ray.model.passes import SEQUENCE_BUCKETS, Shape, padded
from tests.local_engine import LocalEngine

PROMPTS = ["Once upon a time", "The 3 foxes ran.", "a", "What is it, then? No one can tell 1 from 2.", "hello hello"]
NUM_TOKENS = 48
IN_STEP = {"most_ahead": 2}  # where rounds ahead are counted: the coordinator keeps up, on a loaded machine too


@pytest.fixture(scope="module")
def prompts(tiny_dirs):
    with LocalEngine(tiny_dirs, mode="ar") as engine:
        return [engine.models.tokenizer.encode(text) for text in PROMPTS]


def texts(engine: LocalEngine, prompts, params) -> list[list[int]]:
    found = [request.answers[0].token_ids for request in engine.generate(prompts, params)]
    assert all(pool.num_free == pool.num_blocks for pool in engine.pools)
    return found


def answers(dirs, prompts, params, **options) -> list[list[int]]:
    with LocalEngine(dirs, **options) as engine:
        return texts(engine, prompts, params)


def plain(temperature: float = 0.0, most: int = NUM_TOKENS) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, seed=10 + i, max_tokens=most) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["pearl", "sd", "ar"])
@pytest.mark.parametrize(("draft_tp", "target_tp"), [(1, 1), (2, 3)])
def test_the_devices_rounds_give_the_hosts_text(tiny_dirs, prompts, temperature, mode, draft_tp, target_tp):
    params = plain(temperature)
    expected = answers(tiny_dirs, prompts, params, mode="ar")
    options = {"mode": mode, "draft_tp": draft_tp, "target_tp": target_tp}
    with LocalEngine(tiny_dirs, on_device=True, **options, **IN_STEP) as engine:
        assert texts(engine, prompts, params) == expected
    for loop in engine.target_loops:  # they have ended
        assert isinstance(loop, DeviceTargetLoop) and loop.verification is not None
        verification = loop.verification
        assert verification.num_advanced == loop.num_ahead == engine.target_loops[0].num_ahead
        assert verification.num_waits == verification.num_filled + verification.num_advanced
        assert (loop.num_ahead > 0) == (mode != "sd")


@pytest.mark.parametrize("window", [1, 2, 8])
def test_windows_of_every_length_run_ahead(tiny_dirs, prompts, window):
    params = plain(0.5, most=96)
    expected = answers(tiny_dirs, prompts, params, mode="ar", num_blocks=128)
    with LocalEngine(tiny_dirs, window=window, on_device=True, num_blocks=128, **IN_STEP) as engine:
        assert texts(engine, prompts, params) == expected
        assert engine.target_loops[0].num_ahead > 0


def test_most_rounds_of_a_steady_batch_are_queued_ahead(tiny_dirs, prompts):
    """More cache blocks, which come all the time, don't keep a round from being queued ahead."""
    params = [SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)] * len(prompts)
    expected = answers(tiny_dirs, prompts, params, mode="ar", num_blocks=128)
    with LocalEngine(tiny_dirs, on_device=True, num_blocks=128, **IN_STEP) as engine:
        assert texts(engine, prompts, params) == expected
    verification = engine.target_loops[0].verification
    assert verification.num_advanced > 3 * verification.num_filled


def test_wishes_that_need_the_host_share_a_batch_with_those_that_dont(tiny_dirs, prompts):
    params = [
        SamplingParams(temperature=1.0, seed=1, max_tokens=NUM_TOKENS, frequency_penalty=0.5, repetition_penalty=1.5),
        SamplingParams(temperature=0.5, seed=2, max_tokens=20, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, top_k=5, top_p=0.5, min_tokens=10),
        SamplingParams(
            temperature=0.5,
            seed=4,
            max_tokens=NUM_TOKENS,
            structured_outputs=StructuredOutputsParams(regex="[ab]{5,9}"),
        ),
        SamplingParams(temperature=1.0, seed=5, max_tokens=NUM_TOKENS, logit_bias={7: 3.0, 9: -2.0}),
    ]
    expected = answers(tiny_dirs, prompts, params, mode="ar")
    for options in ({}, {"target_tp": 2}, {"draft_grammars": False, "mode": "sd"}):
        with LocalEngine(tiny_dirs, on_device=True, **options) as engine:
            assert texts(engine, prompts, params) == expected


def test_filters_run_ahead_too(tiny_dirs, prompts):
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS, top_k=k, top_p=p, min_p=m)
        for i, (k, p, m) in enumerate([(5, 1.0, 0.0), (0, 0.75, 0.0), (0, 1.0, 0.125), (7, 0.5, 0.0625), (0, 1.0, 0.0)])
    ]
    expected = answers(tiny_dirs, prompts, params, mode="ar")
    with LocalEngine(tiny_dirs, on_device=True, **IN_STEP) as engine:
        assert texts(engine, prompts, params) == expected
        assert engine.target_loops[0].num_ahead > 0


MIXED = [
    {"verification": "rejection"},
    {"temperature": 0.5},
    {"verification": "rejection", "top_k": 6, "top_p": 0.75, "draft_temperature": 0.5},
    {"top_k": 4},
    {"verification": "rejection", "temperature": 0.0},
]
ALONE = [MIXED[0], MIXED[2], MIXED[4], {"verification": "rejection", "min_p": 0.125}, MIXED[0]]


def rejecting(kinds: list[dict[str, object]], most: int = NUM_TOKENS) -> list[SamplingParams]:
    return [SamplingParams(seed=i, max_tokens=most, **kind) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]


@pytest.fixture
def judged_by_host(monkeypatch) -> list[RoundPlan]:
    """The rounds with the host between pass and verdict."""
    plans: list[RoundPlan] = []
    judge = DeviceTargetLoop._judge

    def noting(loop: DeviceTargetLoop, plan: RoundPlan, *rest: object) -> list[tuple[int, int]]:
        plans.append(plan)
        return judge(loop, plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceTargetLoop, "_judge", noting)
    return plans


SHAPES = [(kinds, mode, window) for kinds in (ALONE, MIXED) for mode in ("pearl", "sd") for window in (1, 4, 8)]
QUICK = [(ALONE, "pearl", 8), (ALONE, "sd", 4), (MIXED, "pearl", 1), (MIXED, "pearl", 4), (MIXED, "sd", 8)]


@pytest.mark.parametrize(
    ("kinds", "mode", "window"),
    [pytest.param(*shape, marks=() if shape in QUICK else pytest.mark.slow) for shape in SHAPES],
    ids=[f"{'alone' if kinds is ALONE else 'mixed'}-{mode}-{window}" for kinds, mode, window in SHAPES],
)
def test_the_rejection_rule_draws_what_the_hosts_rounds_draw(tiny_dirs, prompts, judged_by_host, kinds, mode, window):
    params = rejecting(kinds)
    options = {"mode": mode, "window": window, "num_blocks": 128}
    expected = answers(tiny_dirs, prompts, params, **options)
    with LocalEngine(tiny_dirs, on_device=True, **options, **IN_STEP) as engine:
        assert texts(engine, prompts, params) == expected
        [loop] = engine.target_loops
    verification = loop.verification
    assert verification.num_advanced == loop.num_ahead and (loop.num_ahead > 0) == (mode == "pearl")
    assert verification.num_waits == verification.num_filled + verification.num_advanced > 0
    # Only rounds with a prompt take the host.
    assert all(any(work.num_drafted == work.num_tested == 0 for work in plan.works) for plan in judged_by_host)


def test_the_rejection_rules_text_is_the_same_ahead_in_turn_and_by_the_host(tiny_dirs, prompts, monkeypatch):
    params = rejecting(MIXED, most=24)
    expected = answers(tiny_dirs, prompts, params)
    for free_rows in (128, 0):
        with LocalEngine(tiny_dirs, on_device=True, target_tp=2, **IN_STEP) as engine:
            engine.wait_until_up()
            for loop in engine.target_loops:
                loop.free_rows = free_rows
            assert texts(engine, prompts, params) == expected
            assert (loop.num_ahead > 0) == (free_rows > 0) and loop.verification.num_filled > 0
    monkeypatch.setattr(device_target, "_draws_plainly", lambda sequence: False)
    with LocalEngine(tiny_dirs, on_device=True) as engine:
        assert texts(engine, prompts, params) == expected
        assert engine.target_loops[0].verification.num_filled == 0


def test_proposals_of_pending_tokens_outlive_rounds_that_take_the_host(tiny_dirs, prompts):
    """Prompts come between rounds queued ahead, and a neighbour that needs the host comes and goes."""
    params = rejecting(MIXED)
    params[3] = SamplingParams(seed=3, max_tokens=6, logprobs=1)
    many, wishes = [*prompts, [7] * 60, *prompts], [*params, params[0], *params]
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "num_blocks": 128}
    expected = answers(tiny_dirs, many, wishes, **options)
    with LocalEngine(tiny_dirs, on_device=True, **options, **IN_STEP) as engine:
        assert texts(engine, many, wishes) == expected
        assert engine.target_loops[0].num_ahead > 0


def test_preemption_among_rounds_queued_ahead_doesnt_change_the_text(tiny_dirs, prompts):
    """Two sequences fit when they join, and not when they have grown."""
    params = [SamplingParams(temperature=0.0, max_tokens=72, ignore_eos=True)] * len(prompts)
    expected = answers(tiny_dirs, prompts, params, mode="ar", num_blocks=128)
    with LocalEngine(tiny_dirs, num_blocks=30, block_size=4, max_num_batched_tokens=16, on_device=True) as engine:
        assert texts(engine, prompts, params) == expected
        assert engine.controller.statistics.preemptions > 0


def test_a_passs_rows_are_bounded_by_what_is_free(tiny_dirs, prompts):
    """A batch whose longest windows would not fit is never queued ahead."""
    expected = answers(tiny_dirs, prompts, plain(), mode="ar")
    for free_rows, runs_ahead in ((128, True), (3, False)):
        with LocalEngine(tiny_dirs, on_device=True, **IN_STEP) as engine:
            engine.wait_until_up()
            [loop] = engine.target_loops
            loop.free_rows = free_rows
            assert texts(engine, prompts, plain()) == expected
            assert loop.verification.num_filled > 0 and (loop.num_ahead > 0) == runs_ahead


def test_sequences_that_come_and_go_give_their_place_on_the_device_back(tiny_dirs, prompts):
    many = [prompts[i % len(prompts)] for i in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=6)] * len(many)
    expected = answers(tiny_dirs, many, params, mode="ar")
    assert answers(tiny_dirs, many, params, max_num_seqs=4, on_device=True) == expected


def test_drafting_waits_once_per_window(tiny_dirs, prompts):
    with LocalEngine(tiny_dirs, on_device=True) as engine:
        texts(engine, prompts, plain())
        [steps] = [loop.steps for loop in engine.draft_loops]
        assert 0 < steps.num_waits < steps.num_steps / 2


@pytest.mark.parametrize("mode", ["pearl", "sd"])
@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}, {"verification": "rejection"}])
def test_every_draft_pass_of_a_decoding_round_has_its_graph(tiny_dirs, prompts, monkeypatch, mode, fields):
    captured: dict[GraphPool, set[object]] = {}
    ran: dict[GraphPool, set[object]] = {}

    def run(pool: GraphPool, key: object, function: Callable[[], object]) -> None:
        ran.setdefault(pool, set()).add(key)
        function()

    monkeypatch.setattr(GraphPool, "capture", lambda pool, key, _: captured.setdefault(pool, set()).add(key))
    monkeypatch.setattr(GraphPool, "run", run)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=24, **fields) for i in range(11)]
    with LocalEngine(tiny_dirs, on_device=True, mode=mode, num_blocks=256) as engine:
        texts(engine, [prompts[i % len(prompts)] for i in range(11)], params)
    [pool] = [parts.runner.graphs for parts in engine.device_parts if parts.steps is not None]
    decoding = {key for key in ran[pool] if not isinstance(key, Shape) or key.rows <= key.seqs}
    assert any(isinstance(key, Shape) for key in decoding) and len(decoding) > 4
    assert decoding <= captured[pool]


@pytest.mark.parametrize("max_num_seqs", [1, 5, 40])
def test_what_is_captured_runs_first_whatever_the_number_of_sequences(tiny_dirs, prompts, monkeypatch, max_num_seqs):
    """As a GPU does it: each graph's function is called once before its capture."""
    captured: dict[GraphPool, list[object]] = {}

    def capture(pool: GraphPool, key: object, function: Callable[[], object]) -> None:
        captured.setdefault(pool, []).append(key)
        function()

    monkeypatch.setattr(GraphPool, "capture", capture)
    with LocalEngine(tiny_dirs, on_device=True, max_num_seqs=max_num_seqs, num_blocks=256) as engine:
        texts(engine, prompts[:1], plain()[:1])
    [pool] = [parts.runner.graphs for parts in engine.device_parts if parts.steps is not None]
    sizes = [key[1] for key in captured[pool] if not isinstance(key, Shape) and key[0] == "step"]
    assert max(sizes) == padded(max_num_seqs, SEQUENCE_BUCKETS)


def test_what_is_warmed_up_leaves_cache_and_text_alone(tiny_dirs, prompts):
    params = plain()
    expected = answers(tiny_dirs, prompts, params, mode="ar")
    with LocalEngine(tiny_dirs, on_device=True, max_num_seqs=5) as engine:
        engine.wait_until_up()
        for parts in engine.device_parts:
            before = [layer.clone() for layer in parts.runner._cache.k]
            with torch.inference_mode():
                parts.runner.warm_up()
                if parts.verification is not None:
                    parts.verification.warm_up(9)
                    warm_up_rejection(parts, 9)
            assert all(torch.equal(a, b) for a, b in zip(before, parts.runner._cache.k, strict=True))
        assert texts(engine, prompts, params) == expected


def test_the_costs_of_passes_and_steps_are_measured_for_every_size_there_is_room_for(tiny_dirs, prompts):
    with LocalEngine(tiny_dirs, on_device=True) as engine:
        texts(engine, prompts, plain())
    seconds = {
        role: profile(role, parts, 64, 32)
        for role in ("draft", "target")
        for parts in engine.device_parts
        if (parts.steps is not None) == (role == "draft")
    }
    assert list(seconds["target"]) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert list(seconds["draft"]) == [1, 2, 4, 8, 16]  # max_num_seqs
    assert all(value > 0 for table in seconds.values() for value in table.values())


def test_rounds_that_the_host_judges_dont_tell_what_others_take(tiny_dirs):
    """They take longer: whatever number of draft steps they had would pass for a dear one."""
    seen: list[int] = []

    class Recording(RoundCosts):
        def observe_round(self, rows: int, sequences: int, steps: int, seconds: float) -> None:
            seen.append(steps)

    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LocalEngine(tiny_dirs, window=4, on_device=True) as engine:
        engine.controller.windows.costs = Recording(StepCosts({1: 1.0}, {1: 1.0}), at_once=True, shares_device=True)
        texts(engine, [list(range(2, 20))], [replace(params, logprobs=1)])
        assert not seen
        texts(engine, [list(range(2, 20))], [params])
    assert seen.count(4) > 4 and set(seen) <= {0, 1, 2, 3, 4}


def test_costs_are_learnt_from_rounds_without_prompts(tiny_dirs):
    """A prompt's chunks of 16 rows would pass for dear rounds of one."""
    seen: list[tuple[str, int]] = []

    class Recording(RoundCosts):
        def observe_target(self, rows: int, seconds: float) -> None:
            seen.append(("target rows", rows))

        def observe_draft(self, sequences: int, steps: int, seconds: float) -> None:
            seen.append(("draft steps", steps))

    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LocalEngine(tiny_dirs, window=4, max_num_batched_tokens=16, on_device=True) as engine:
        engine.controller.windows.costs = Recording(StepCosts({1: 1.0}, {1: 1.0}), at_once=True)
        texts(engine, [list(range(2, 60)) * 2], [params])
    rows = [number for kind, number in seen if kind == "target rows"]
    assert len(rows) > 4 and max(rows) <= 4
    steps = [number for kind, number in seen if kind == "draft steps"]
    assert steps.count(4) > 4 and set(steps) <= {0, 1, 2, 3, 4}
