"""Long prompts go at a pace beside decoding sequences: every plan keeps to it, nobody starves, and the pace that is
chosen leaves the running requests their share on machines of many kinds."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pearl_ray.core.messages import PlanDiff, SetPace
from pearl_ray.core.pacing import PacingPolicy
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Mode, SequenceState
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import CATCH_UP, MOST_ROUNDS, ROUND, Limits, Member, Pace, Prefill, RoundPlan, plan_round
from tests.simulation import Simulation

PLENTY = 1 << 20


def decoding(seq_id: int, *, window: int = 0, draft_lack: int = 0, needs_draft: bool = False) -> Member:
    """A sequence that decodes; its draft lacks ``draft_lack`` tokens."""
    committed = 20_000
    state = SequenceState(10, committed, PLENTY, window, (), committed - 1, committed - 1 - draft_lack)
    return Member(seq_id, state, PLENTY, PLENTY, needs_draft)


def prompt(seq_id: int, lack: int, draft_lack: int | None = None) -> Member:
    """A prompt of which the target lacks ``lack`` tokens, the draft too if nothing else is said."""
    size = max(lack, draft_lack or 0)
    draft_kv = size - (lack if draft_lack is None else draft_lack)
    return Member(seq_id, SequenceState(size, size, PLENTY, 3, (), size - lack, draft_kv), PLENTY, PLENTY)


def fed(plan: RoundPlan, seq_ids: set[int]) -> tuple[int, int]:
    """What target and draft feed of these sequences."""
    works = [work for work in plan.works if work.seq_id in seq_ids]
    return sum(work.target_fed for work in works), sum(work.draft_fed for work in works)


# -- plans ----------------------------------------------------------------------------------------------------------

paces = st.builds(Pace, st.integers(1, 600), st.integers(ROUND, MOST_ROUNDS * ROUND))
lacks = st.lists(st.integers(1, 3000), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(16, 600),
    num_decoding=st.integers(1, 12),
    lacks=lacks,
    pace=paces,
    debt=st.integers(0, MOST_ROUNDS * ROUND),
    mode=st.sampled_from(["pearl", "sd", "ar"]),
)
def test_every_plan_keeps_to_the_pace_and_prompts_that_fit_in_the_round_are_not_paced(
    budget: int, num_decoding: int, lacks: list[int], pace: Pace, debt: int, mode: Mode
) -> None:
    members = [decoding(i) for i in range(num_decoding)] + [prompt(100 + i, lack) for i, lack in enumerate(lacks)]
    limits = Limits(mode, budget)
    free, paced = plan_round(members, limits), plan_round(members, limits, pace, debt)
    lack_of = {100 + i: lack for i, lack in enumerate(lacks)}
    works = {work.seq_id: work for work in free.works}
    for side in ("target_fed", "draft_fed") if mode != "ar" else ("target_fed",):
        got = {seq_id: getattr(works[seq_id], side) if seq_id in works else 0 for seq_id in lack_of}
        long = {seq_id for seq_id in lack_of if got[seq_id] < lack_of[seq_id]}
        fed_now = {work.seq_id: getattr(work, side) for work in paced.works}
        assert all(fed_now[seq_id] == lack_of[seq_id] for seq_id in lack_of.keys() - long)
        total = sum(fed_now.get(seq_id, 0) for seq_id in long)
        room = sum(got[seq_id] for seq_id in long)
        assert total == (0 if debt >= ROUND else min(pace.tokens, room))
        assert total <= pace.tokens
    assert free.works[:num_decoding] == paced.works[:num_decoding]
    assert paced.num_decoding == num_decoding


@given(lacks=lacks, pace=paces, debt=st.integers(0, 999))
def test_without_decoding_sequences_nothing_is_paced(lacks: list[int], pace: Pace, debt: int) -> None:
    members = [prompt(i, lack) for i, lack in enumerate(lacks)]
    paced, free = plan_round(members, Limits("pearl", 128), pace, debt), plan_round(members, Limits("pearl", 128))
    assert paced == free and paced.debt == 0 and paced.num_decoding == 0


def test_a_pace_without_limit_is_no_pace() -> None:
    members = [decoding(0), prompt(1, 3000), prompt(2, 500), prompt(3, 20)]
    limits = Limits("pearl", 128)
    assert plan_round(members, limits, Pace(128), 0) == plan_round(members, limits)


def test_a_short_prompt_goes_ahead_in_a_round_in_which_the_long_one_rests() -> None:
    members = [decoding(0), prompt(1, 30_000), prompt(2, 20)]
    plan = plan_round(members, Limits("pearl", 128), Pace(64, 4 * ROUND), debt=2 * ROUND)
    assert fed(plan, {1}) == (0, 0) and fed(plan, {2}) == (20, 20)
    assert plan.prefill is not None and (plan.prefill.tokens, plan.prefill.others) == (0, 40)


@pytest.mark.parametrize(
    ("every", "chunks", "rounds"), [(16, 17, 17), (17, 16, 17), (24, 2, 3), (32, 1, 2), (56, 2, 7)]
)
def test_chunks_come_as_often_as_the_pace_says_also_in_parts_of_a_round(every: int, chunks: int, rounds: int) -> None:
    debt, turns = 0, []
    for _ in range(4 * rounds):
        plan = plan_round([decoding(0), prompt(1, 9999)], Limits("pearl", 128), Pace(32, every), debt)
        debt = plan.debt
        turns.append(fed(plan, {1})[0] > 0)
    assert turns[0] and sum(turns) == 4 * chunks
    gaps = [len(list(same)) for rest, same in itertools.groupby(turns) if not rest]
    assert max(gaps, default=0) <= math.ceil(every / ROUND) - 1


def test_a_round_without_room_for_a_chunk_is_nothing_to_rest_for() -> None:
    members = [*(decoding(i) for i in range(8)), prompt(50, 600)]
    plan = plan_round(members, Limits("ar", 8), Pace(32, 64 * ROUND), 0)
    assert plan.prefill is not None and plan.prefill.tokens == 0 and plan.debt == 0
    plan = plan_round(members, Limits("ar", 40), Pace(32, 64 * ROUND), 0)
    assert plan.prefill is not None and plan.prefill.tokens == 32 and plan.debt == 63 * ROUND


@pytest.mark.parametrize("num_prompts", [0, 1, 4])
def test_a_draft_that_is_behind_comes_nearer_beside_any_number_of_long_prompts(num_prompts: int) -> None:
    """Its sequence goes on by a token a round, and never drafts again unless the draft is given more than that."""
    lack, debt, pace, rounds = 5000, 0, Pace(32, 64 * ROUND), 320
    for _ in range(rounds):
        behind = decoding(1, window=3, draft_lack=lack)
        prompts = [prompt(50 + i, 20_000) for i in range(num_prompts)]
        plan = plan_round([decoding(0), behind, *prompts], Limits("pearl", 2048), pace, debt)
        debt = plan.debt
        lack += 1 - sum(work.draft_fed for work in plan.works if work.seq_id == 1)
    assert lack <= 5000 - rounds * (CATCH_UP - 1)


def test_the_debt_is_forgotten_when_no_long_prompt_waits() -> None:
    assert plan_round([decoding(0)], Limits("pearl", 128), Pace(32, 640), debt=600).debt == 0
    assert plan_round([decoding(0), prompt(1, 20)], Limits("pearl", 128), Pace(32, 640), debt=600).debt == 0


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(20, 200),
    paces=st.lists(paces, min_size=1, max_size=8),
    behind=st.lists(st.booleans(), max_size=4),
    lacks=st.lists(st.integers(1, 700), max_size=3),
)
@example(budget=40, paces=[Pace(1, MOST_ROUNDS * ROUND)], behind=[True, False, False], lacks=[300])
def test_prompts_and_drafts_that_are_behind_get_there_whatever_the_paces(
    budget: int, paces: list[Pace], behind: list[bool], lacks: list[int]
) -> None:
    """The sequence that decodes goes on all the while, as do those that are behind; ``behind`` says who waits."""
    limits = Limits("pearl", budget)
    replies = {0: decoding(0)}
    replies |= {1 + i: decoding(1 + i, window=3, draft_lack=600, needs_draft=needs) for i, needs in enumerate(behind)}
    replies |= {50 + i: prompt(50 + i, lack) for i, lack in enumerate(lacks)}
    members, debt = replies, 0
    waiting = set(members) - {0}
    for number in range(400_000):
        if not waiting:
            return
        plan = plan_round(members.values(), limits, paces[number // 7 % len(paces)], debt)
        assert plan.works
        debt = plan.debt
        for work in plan.works:
            state = members[work.seq_id].state
            if work.num_drafted:
                waiting.discard(work.seq_id)
            made = int(state.is_decoding and work.num_rows > 0)
            state = SequenceState(
                state.num_prompt,
                state.num_committed + made,
                PLENTY,
                state.window,
                (),
                state.target_kv + (made if state.is_decoding else work.target_fed),
                state.draft_kv + (work.draft_fed if not work.num_drafted else 0),
            )
            if not state.is_decoding and state.target_kv == state.num_committed:
                waiting.discard(work.seq_id)
                del members[work.seq_id]
                continue
            if work.num_drafted:  # it has caught up: out of the way
                del members[work.seq_id]
                continue
            members[work.seq_id] = Member(work.seq_id, state, PLENTY, PLENTY, members[work.seq_id].needs_draft)
    raise AssertionError(f"{waiting} never get there")


# -- replicas -------------------------------------------------------------------------------------------------------


def test_replicas_that_differ_in_pace_or_debt_have_other_checksums() -> None:
    one, two = Replica(Limits("pearl", 128), 16), Replica(Limits("pearl", 128), 16)
    one.apply(PlanDiff(1, [SetPace(64, 40)]))
    two.apply(PlanDiff(1, [SetPace(64, 41)]))
    assert one.checksum() != two.checksum() and one.pace == Pace(64, 40)
    two.pace = one.pace
    assert one.checksum() == two.checksum()
    two.debt = 5
    assert one.checksum() != two.checksum()


@settings(max_examples=20, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(1, 30), paces), max_size=5), lag=st.integers(0, 3))
def test_texts_and_replicas_are_the_same_at_any_pace(changes: list[tuple[int, Pace]], lag: int) -> None:
    simulation = Simulation(max_num_batched_tokens=16, max_model_len=200, num_blocks=200)
    wanted = SamplingParams(temperature=0.0, seed=1, max_tokens=40, ignore_eos=True)
    prompts = [[1, 2], [i % 7 for i in range(120)], [3], [i % 5 for i in range(90)]]
    requests = [simulation.controller.submit(f"r{i}", None, p, wanted) for i, p in enumerate(prompts)]
    simulation.collect()
    due = list(itertools.accumulate(changes, lambda a, b: (a[0] + b[0], b[1]))) if changes else []
    for number in range(2000):
        while due and due[0][0] <= number:
            pace = due.pop(0)[1]
            simulation.controller._changes.append(SetPace(pace.tokens, pace.every))
            simulation.collect()
        worked = simulation.round()  # compares both shards' plans and checksums; the controller compares its own
        while len(simulation.summaries) > (lag if worked else 0):
            simulation.deliver_summary()
        if not worked and not simulation.diffs:
            break
    for request, tokens in zip(requests, prompts, strict=True):
        assert request.answers[0].token_ids == simulation.expected(tokens, wanted)
    simulation.assert_at_rest()


# -- the policy, against machines -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Machine:
    """Seconds of a round: a plain one's, the chunk's on top of it; noise, and what else may happen.

    Attributes:
        plain: by decoding sequences.
        fixed, per_token, free: a chunk costs ``fixed + per_token * (tokens - free)``, at a context of 0.
        growth: what it costs at the end of the prompt, by that.
        bursts: how many rounds, of either kind, take three times as long.
        hindered: a round without a chunk, while a prompt waits, by one while none does.
    """

    plain: Callable[[int], float] = lambda n: 0.01 + 0.0001 * n
    fixed: float = 0.0
    per_token: float = 0.0
    free: int = 0
    growth: float = 1.0
    hindered: float = 1.0
    noise: float = 0.05
    bursts: float = 0.0
    outliers: dict[int, float] = field(default_factory=dict)  # by number of the round with a chunk

    def extra(self, tokens: int, progress: float) -> float:
        if not tokens:
            return 0.0
        return (self.fixed + self.per_token * max(tokens - self.free, 0)) * (1 + (self.growth - 1) * progress)


@dataclass(slots=True)
class Run:
    """A prefill: the running requests' share of their speed, and the prefill's of its part of the time."""

    share: float
    part: float
    seconds: float
    chunks: list[int]
    rounds: int
    paces: list[Pace]


def prefill(
    machine: Machine,
    policy: PacingPolicy,
    *,
    budget: int = 2048,
    num_tokens: int = 30_000,
    num_decoding: int = 8,
    num_long: int = 1,
    warm: int = 40,
    delay: int = 3,
    share: float = 0.75,
    join: Callable[[int], int] = lambda number: 0,
) -> Run:
    """Rounds with nothing but decoding, then long prompts until they are finished or short.

    A pace is in force ``delay`` rounds after it was chosen; ``join``: sequences more that decode, by round.
    """
    chance = random.Random(5)
    limits = Limits("ar", budget)
    on_its_way: deque[Pace] = deque([Pace(budget)] * delay)
    debt, left = 0, dict.fromkeys(range(1000, 1000 + num_long), num_tokens)
    ideal = took = extra_s = 0.0
    chunks: list[int] = []
    paces: list[Pace] = []
    number = 0
    while left:
        waits = number >= warm
        count = num_decoding + (join(number - warm) if waits else 0)
        members = [decoding(i) for i in range(count)]
        members += [prompt(seq_id, lack) for seq_id, lack in left.items()] if waits else []
        pace = on_its_way.popleft()
        plan = plan_round(members, limits, pace, debt)
        debt = plan.debt
        tokens = plan.prefill.tokens + plan.prefill.others if plan.prefill is not None else 0
        done = 1 - sum(left.values()) / (num_tokens * num_long)
        plain = machine.plain(count)
        extra = machine.extra(tokens, done)
        seconds = plain * (machine.hindered if waits else 1.0) + extra
        seconds *= (1 + machine.noise * chance.uniform(-1, 1)) * (3 if chance.random() < machine.bursts else 1)
        if tokens:
            chunks.append(tokens)
            seconds += machine.outliers.get(len(chunks), 0.0)
        for work in plan.works:
            if work.seq_id in left:
                left[work.seq_id] -= work.target_fed
                if left[work.seq_id] == 0:
                    del left[work.seq_id]
        if waits:
            ideal, took, extra_s = (
                ideal + plain * (1 + 2 * machine.bursts),
                took + seconds,
                extra_s + extra * (1 + 2 * machine.bursts),
            )
            paces.append(pace)
        on_its_way.append(policy.observe(seconds, plan.num_decoding, plan.prefill))
        number += 1
        assert number < 200_000
    share = min(share, num_decoding / (num_decoding + num_long))
    part = 1 - share * (machine.hindered if num_decoding else 1.0)  # what the running requests leave of the time
    return Run(ideal / took, extra_s / took / part, took, chunks, number - warm, paces)


GPU = Machine(fixed=0.011, per_token=0.0001, free=128, growth=1.3)
MACHINES = {
    "gpu": GPU,
    "gpu-hindered": Machine(fixed=0.008, per_token=0.0001, free=128, growth=2.0, hindered=1.1),
    "cpu": Machine(plain=lambda n: 0.08 + 0.005 * n, per_token=0.006, growth=1.5),
    "cpu-dear": Machine(plain=lambda n: 0.002, fixed=0.0005, per_token=0.00015, growth=4.0),
    "growing": Machine(fixed=0.002, per_token=0.00005, growth=4.0),
    "cheap": Machine(fixed=0.0002, per_token=0.0000002),
    "noisy": Machine(fixed=0.004, per_token=0.0001, growth=3.0, noise=0.3),
    "shared": Machine(plain=lambda n: 0.03, fixed=0.01, per_token=0.0003, growth=2.0, noise=0.4, bursts=0.1),
}


@pytest.mark.parametrize("budget", [128, 512, 2048])
@pytest.mark.parametrize("name", MACHINES)
def test_the_running_requests_keep_their_share_and_the_prefill_gets_its_part(name: str, budget: int) -> None:
    run = prefill(MACHINES[name], PacingPolicy(0.75, budget), budget=budget)
    assert run.share >= 0.7, run
    if name == "cheap":  # all that it can use
        assert run.rounds <= 18 / 17 * len(run.chunks) + 1
    else:
        assert run.part >= 0.8, run


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_other_shares_are_kept_as_well(share: float) -> None:
    for machine in (GPU, MACHINES["cpu"]):
        run = prefill(machine, PacingPolicy(share, 512), budget=512, share=share)
        assert run.share >= share - 0.05 and run.part >= 0.8, run


def test_chunks_are_large_where_any_chunk_is_dear_and_small_where_every_token_is() -> None:
    def middle(machine: Machine) -> int:
        chunks = sorted(prefill(machine, PacingPolicy(0.75, 2048)).chunks)
        return chunks[len(chunks) // 2]

    assert middle(Machine(fixed=0.05, per_token=0.00005)) > 1000
    assert middle(MACHINES["cpu"]) == 32


def test_a_share_of_nothing_changes_nothing() -> None:
    policy = PacingPolicy(0.0, 512)
    run = prefill(GPU, policy, budget=512)
    assert set(run.paces) == {Pace(512)} and run.rounds == len(run.chunks) == -(-30_000 // 504)


def test_without_a_prompt_that_waits_the_pace_is_chosen_once() -> None:
    """A change would cost rounds their being queued ahead."""
    policy, chance = PacingPolicy(0.75, 2048), random.Random(2)
    chosen = {policy.observe(0.01 * chance.uniform(0.5, 1.5), chance.randint(1, 64), None) for _ in range(500)}
    assert chosen == {Pace(128, 17)}


@pytest.mark.parametrize("at", [1, 2, 3, 4, 40])
def test_a_chunk_that_compiled_a_kernel_does_not_starve_the_prefill(at: int) -> None:
    usual = prefill(GPU, PacingPolicy(0.75, 512), budget=512)
    run = prefill(replace(GPU, outliers={at: 20.0}), PacingPolicy(0.75, 512), budget=512)
    assert run.rounds < 1.5 * usual.rounds


def test_a_plain_round_that_took_long_does_not_let_the_prefill_go_as_it_likes() -> None:
    policy = PacingPolicy(0.75, 512)
    for _ in range(40):
        policy.observe(0.01, 8, None)
    policy.observe(20.0, 8, None)
    assert policy.round_s < 0.0115


def test_one_running_request_beside_many_prompts_does_not_hold_them_up() -> None:
    free = prefill(GPU, PacingPolicy(0.0, 512), budget=512, num_tokens=2000, num_decoding=1, num_long=63)
    run = prefill(GPU, PacingPolicy(0.75, 512), budget=512, num_tokens=2000, num_decoding=1, num_long=63)
    assert run.seconds < 1.15 * free.seconds


def test_as_many_prompts_as_running_requests_have_half_of_the_time() -> None:
    run = prefill(MACHINES["cpu"], PacingPolicy(0.75, 512), budget=512, num_tokens=2000, num_decoding=8, num_long=8)
    assert 0.4 < run.share < 0.6 and run.part >= 0.8


def test_the_next_prompt_is_paced_from_its_first_chunk() -> None:
    policy = PacingPolicy(0.75, 512)
    for _ in range(4):
        run = prefill(GPU, policy, budget=512, num_tokens=4000)
        assert run.share > 0.68
    assert run.share >= 0.7


def test_without_a_round_to_compare_with_a_prompt_rests_soon_to_get_one() -> None:
    run = prefill(GPU, PacingPolicy(0.75, 512), budget=512, warm=0)
    assert run.share >= 0.7


GROWING: Callable[[int], float] = lambda n: 0.005 + 0.0005 * n  # noqa: E731


class NeverRests(PacingPolicy):
    """Paces by the size of chunks alone: there is one in every round, and what one without takes is what it was."""

    def observe(self, seconds: float, num_decoding: int, prefill: Prefill | None) -> Pace:
        return Pace(super().observe(seconds, num_decoding, prefill).tokens, ROUND)


def shrunk_batch(kind: type[PacingPolicy] = PacingPolicy) -> Run:
    """Of 64 sequences that decode four are left soon after the prompt has come; a chunk was cheap beside the many."""
    machine = Machine(plain=GROWING, fixed=0.01)
    left = lambda number: -60 if number > 40 else 0  # noqa: E731
    return prefill(machine, kind(0.75, 192), budget=192, num_tokens=60_000, num_decoding=64, join=left)


def grown_batch() -> Run:
    """Of 64 sequences that decode all but one come soon after the prompt."""
    machine = Machine(plain=GROWING, fixed=0.005, per_token=0.00002)
    return prefill(machine, PacingPolicy(0.75, 512), num_decoding=1, join=lambda number: 63 if number > 40 else 0)


def test_a_batch_that_changes_during_the_prefill_is_noticed() -> None:
    assert shrunk_batch().share >= 0.7 and grown_batch().share >= 0.7


def test_a_policy_that_never_rests_does_not_notice() -> None:
    assert shrunk_batch(NeverRests).share < 0.6
