"""Two hundred requests of every kind through a cache that is far too small: preemption, eviction, refusal, and no text
is another than the one that its request gets alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pearl_ray.core.errors import RequestRefusedError
from pearl_ray.core.messages import Join, Leave, PlanDiff
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Mode, SequenceState
from pearl_ray.core.replica import BatchSequence, Replica
from tests.pressure import (
    LETTERS,
    TINY,
    Arrival,
    BatchedSimulation,
    alone,
    answers_of,
    check_texts,
    random_params,
    serve_simulation,
    serve_tiny_pair,
    traffic,
)

pytestmark = pytest.mark.timeout(1200)  # minutes on a loaded machine

WINDOW = 3


def assert_it_was_tight(outcome, num_hopeless: int) -> None:
    """The cache was too small for what was asked of it: all three ways of coping were gone."""
    assert outcome.preemptions > 0 and outcome.evictions > 0 and outcome.hit_tokens > 0
    assert len(outcome.refused) == num_hopeless


@pytest.mark.parametrize("mode", ["pearl", pytest.param("sd", marks=pytest.mark.slow)])
def test_two_hundred_mixed_requests_under_pressure_have_the_texts_they_have_alone(mode: Mode) -> None:
    blocks, size = 1064, 4
    arrivals = traffic(1, 200, LETTERS, rate=4.0, room=blocks * size)
    assert min(len(a.prompt) for a in arrivals) < 12 and max(len(a.prompt) for a in arrivals) > 3_500
    options = {"block_size": size, "window": WINDOW}
    batch = {"max_num_seqs": 32, "max_num_batched_tokens": 512}
    outcome = serve_simulation(arrivals, mode=mode, num_blocks=blocks, decode_share=0.75, **batch, **options)
    assert_it_was_tight(outcome, num_hopeless=10)
    assert outcome.num_paced > 20
    check_texts(arrivals, outcome, lambda a: alone(serve_simulation, a, mode, max_num_batched_tokens=4096, **options))


def on_the_tiny_pair(dirs, mode: Mode, count: int, prompts: tuple[int, int], blocks: int) -> None:
    size = 4
    arrivals = traffic(2, count, TINY, rate=2.0, prompts=prompts, room=blocks * size, hopeless=10)
    serve = functools.partial(serve_tiny_pair, dirs=dirs, block_size=size, window=WINDOW)
    batch = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "decode_share": 0.75}
    outcome = serve(arrivals, mode=mode, num_blocks=blocks, **batch)
    assert_it_was_tight(outcome, num_hopeless=count // 10)
    check_texts(arrivals, outcome, lambda a: alone(serve, a, mode, max_num_batched_tokens=1024))


def test_the_tiny_pair_under_pressure_writes_what_it_writes_for_each_request_alone(tiny_dirs) -> None:
    on_the_tiny_pair(tiny_dirs, "pearl", 24, (10, 400), blocks=130)


@pytest.mark.parametrize("mode", ["pearl", "sd", "ar"])
def test_rounds_on_a_device_have_the_same_texts_while_a_long_prompt_goes_at_its_pace(tiny_dirs, mode: Mode) -> None:
    chance = random.Random(7)
    lengths = [(0, 6)] * 4 + [(12, 700), (30, 300)]
    arrivals = [
        Arrival(
            at, tuple(chance.choices(TINY.ids, k=length)), SamplingParams(temperature=1.0, seed=length, max_tokens=120)
        )
        for at, length in lengths
    ]
    serve = functools.partial(serve_tiny_pair, dirs=tiny_dirs, window=WINDOW)
    batch = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 400}
    outcome = serve(arrivals, mode=mode, on_device=True, most_ahead=3, max_model_len=1024, decode_share=0.75, **batch)
    assert outcome.num_paced > 3
    check_texts(arrivals, outcome, lambda a: alone(serve, a, mode, max_num_batched_tokens=1024))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_two_hundred_mixed_requests_on_the_tiny_pair_have_the_texts_they_have_alone(tiny_dirs, mode: Mode) -> None:
    on_the_tiny_pair(tiny_dirs, mode, 200, (10, 4000), blocks=1064)


# -- orders of arrival and abort ------------------------------------------------------------------------------------

SMALL = {"num_blocks": 26, "block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 96}


@functools.cache
def small_arrival(number: int) -> Arrival:
    chance = random.Random(number)
    prompt = tuple(chance.choices(LETTERS.ids, k=chance.randint(1, 40)))
    return Arrival(0, prompt, random_params(chance, LETTERS, longest=40))


@functools.cache
def small_alone(number: int, mode: Mode) -> list[object]:
    options = SMALL | {"window": WINDOW}
    del options["num_blocks"]
    return alone(serve_simulation, small_arrival(number), mode, **options)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 24)),
        st.tuples(st.just("round"), st.sampled_from([None, 0, 1])),
        st.tuples(st.just("round"), st.none()),
        st.tuples(st.just("hear"), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 9)),
    ),
    min_size=8,
    max_size=60,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS)
def test_whatever_the_order_of_arrivals_and_aborts_each_text_is_that_of_its_request_alone(
    actions: list[tuple[str, int | None]],
) -> None:
    simulation = BatchedSimulation(mode="pearl", window=WINDOW, **SMALL)
    asked, aborted = [], set()
    for what, value in actions:
        if what == "submit":
            arrival = small_arrival(value)
            try:
                request = simulation.controller.submit(f"r{len(asked)}", None, arrival.prompt, arrival.params)
            except RequestRefusedError:
                continue
            asked.append((value, request))
            simulation.collect()
        elif what == "round":
            simulation.round(value)
        elif what == "hear":
            simulation.deliver_summary()
        elif asked:
            index = value % len(asked)
            if simulation.controller.abort(f"r{index}"):
                aborted.add(index)
                simulation.collect()
    simulation.run()
    simulation.assert_at_rest()
    for index, (number, request) in enumerate(asked):
        expected = small_alone(number, "pearl")
        if index not in aborted:
            assert answers_of(request) == expected
            continue
        for found, whole in zip(answers_of(request), expected, strict=True):
            assert found[0] == whole[0][: len(found[0])]


# -- broken twins: preemption that forgets, or keeps, the wrong thing; the same check must see it -------------------

Rejoin = Callable[[BatchSequence, SequenceState], None]


def with_changes(state: SequenceState, **changes: object) -> SequenceState:
    """The state, some of its fields changed; whatever kind of record it is."""
    names = ("num_prompt", "num_committed", "max_total", "window", "pending", "target_kv", "draft_kv")
    return type(state)(**({name: getattr(state, name) for name in names} | changes))


def stale_lengths(sequence: BatchSequence, before: SequenceState) -> None:
    """Takes what the caches held before it left for what they hold now."""
    kept = min(before.target_kv, sequence.state.num_committed - 1)
    sequence.state = with_changes(sequence.state, target_kv=kept, draft_kv=min(before.draft_kv, kept))


def window_taken_for_committed(sequence: BatchSequence, before: SequenceState) -> None:
    """Forgets that the window was pending: its tokens come back as if they had been verified."""
    left = sequence.state.max_total - sequence.state.num_committed - 1
    tokens = [node.token for node in before.pending][: max(left, 0)]
    sequence.tokens += tokens
    sequence.state = with_changes(sequence.state, num_committed=sequence.state.num_committed + len(tokens))


def stale_window(sequence: BatchSequence, before: SequenceState) -> None:
    """Comes back with the window it left with, though the coordinator had heard of fewer committed tokens."""
    left = sequence.state.max_total - sequence.state.num_committed
    sequence.state = with_changes(sequence.state, pending=before.pending[: max(left - 1, 0)])


def break_preemption(monkeypatch: pytest.MonkeyPatch, rejoin: Rejoin) -> None:
    """Every replica alike, so that no checksum tells: who leaves and joins again goes through ``rejoin``.

    The shards' states are taken: they run on until they hear of the preemption.
    """
    apply = Replica.apply
    left: dict[tuple[int, int, int], SequenceState] = {}

    def broken(replica: Replica, diff: PlanDiff) -> None:
        for change in diff.changes:
            if isinstance(change, Leave):
                gone = replica.sequences[change.seq_id]
                key = (id(replica), gone.join.seed, gone.join.sample_index)
                known = left.get(key)
                if known is None or known.num_committed <= gone.state.num_committed:
                    left[key] = gone.state
            apply(replica, msgspec.structs.replace(diff, epoch=replica.epoch + 1, changes=[change]))
            replica.epoch = diff.epoch - 1
            if isinstance(change, Join):
                before = left.get((id(replica), change.seed, change.sample_index))
                if before is not None and before.num_committed > before.num_prompt:
                    rejoin(replica.sequences[change.seq_id], before)
        replica.epoch = diff.epoch

    monkeypatch.setattr(Replica, "apply", broken)


def preempted_few(mode: Mode = "pearl") -> tuple[list[Arrival], dict[str, object]]:
    """A handful of requests of which some are preempted; the coordinator hears late."""
    chance = random.Random(4)
    arrivals = []
    for number in range(8):
        rule = "rejection" if number % 2 else "coupled"
        params = SamplingParams(temperature=1.0, seed=number, max_tokens=80, ignore_eos=True, verification=rule)
        arrivals.append(Arrival(number // 3, tuple(chance.choices(LETTERS.ids, k=6)), params))
    return arrivals, {"mode": mode, "block_size": 4, "window": WINDOW}


@pytest.fixture(scope="module")
def few_alone() -> dict[int, list[object]]:
    arrivals, options = preempted_few()
    mode = options.pop("mode")
    return {a.params.seed: alone(serve_simulation, a, mode, **options) for a in arrivals}


def check_few(few_alone: dict[int, list[object]]) -> None:
    """The check of the two hundred, on the few."""
    arrivals, options = preempted_few()
    outcome = serve_simulation(arrivals, lag=2, num_blocks=36, max_num_seqs=8, max_num_batched_tokens=32, **options)
    assert outcome.preemptions > 0
    check_texts(arrivals, outcome, lambda a: few_alone[a.params.seed])


def test_the_few_that_the_twins_are_tried_on_have_their_texts_when_nothing_is_broken(few_alone) -> None:
    check_few(few_alone)


@pytest.mark.parametrize("rejoin", [stale_lengths, window_taken_for_committed, stale_window], ids=lambda f: f.__name__)
def test_the_check_fails_when_preemption_forgets_the_pending_window_or_keeps_what_is_stale(
    monkeypatch: pytest.MonkeyPatch, few_alone, rejoin: Rejoin
) -> None:
    break_preemption(monkeypatch, rejoin)
    with pytest.raises(AssertionError, match=r"differs from its text alone|holds another prefix|never end"):
        check_few(few_alone)


def test_the_check_sees_stale_lengths_on_the_tiny_pair_by_the_text(monkeypatch: pytest.MonkeyPatch, tiny_dirs) -> None:
    chance = random.Random(5)
    arrivals = [
        Arrival(0, tuple(chance.choices(TINY.ids, k=6)), SamplingParams(temperature=1.0, seed=i, max_tokens=90))
        for i in range(6)
    ]
    serve = functools.partial(serve_tiny_pair, dirs=tiny_dirs, block_size=4, window=WINDOW)
    expected = {a.params.seed: alone(serve, a, "pearl") for a in arrivals}
    pressed = {"mode": "pearl", "num_blocks": 36, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    outcome = serve(arrivals, **pressed)
    assert outcome.preemptions > 0
    check_texts(arrivals, outcome, lambda a: expected[a.params.seed])
    break_preemption(monkeypatch, stale_lengths)
    outcome = serve(arrivals, **pressed)
    with pytest.raises(AssertionError, match="differs from its text alone"):
        check_texts(arrivals, outcome, lambda a: expected[a.params.seed])


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_the_text_is_the_same_when_the_draft_has_to_catch_up_first(verification) -> None:
    """The target finds the prompt in its cache and the draft doesn't: an earlier request made do without a draft."""
    chance = random.Random(6)
    prompt = tuple(chance.choices(LETTERS.ids, k=400))
    first = Arrival(0, prompt, SamplingParams(seed=1, max_tokens=2, num_speculative_tokens=0))
    params = SamplingParams(seed=2, max_tokens=40, ignore_eos=True, verification=verification)
    second = Arrival(40, prompt, params)
    options = {"block_size": 4, "window": WINDOW, "max_num_batched_tokens": 32}
    outcome = serve_simulation([first, second], mode="pearl", num_blocks=400, **options)
    check_texts([first, second], outcome, lambda a: alone(serve_simulation, a, "pearl", **options))
