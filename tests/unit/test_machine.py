"""The state machine, whole: whatever the order of rounds, diffs and summaries, the text is the target's own."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pearl_ray.core.errors import ConfigError, QueueFullError, ReplicaDivergedError, RequestRefusedError
from pearl_ray.core.params import SamplingParams
from tests.simulation import EOS, VOCAB, FakeModel, Simulation

MODES = ("pearl", "sd", "ar")


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "seed": 3} | changes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_text_is_the_targets_own_in_every_mode_window_and_temperature(mode, window, temperature):
    simulation = Simulation(mode=mode, window=window)
    asked = {}
    for number in range(6):
        wanted = params(temperature=temperature, seed=number, max_tokens=5 + 3 * number)
        prompt = [number % VOCAB, (3 * number) % VOCAB, 1][: 1 + number % 3]
        asked[f"r{number}"] = (simulation.controller.submit(f"r{number}", None, prompt, wanted), prompt, wanted)
    simulation.run()
    for request, prompt, wanted in asked.values():
        assert request.answers[0].token_ids == simulation.expected(prompt, wanted)
    simulation.assert_at_rest()


@pytest.mark.parametrize("mode", MODES)
def test_penalties_bias_and_min_tokens_are_exact_inside_windows(mode):
    simulation = Simulation(mode=mode, window=4)
    wanted = [
        params(temperature=0.8, presence_penalty=1.0, frequency_penalty=0.5),
        params(repetition_penalty=1.7, temperature=0.5),
        params(logit_bias={EOS: 6.0}, min_tokens=7),
        params(temperature=1.0, top_k=3, top_p=0.8, min_p=0.05, draft_temperature=0.3),
    ]
    requests = [simulation.controller.submit(str(i), None, [i, 2], p) for i, p in enumerate(wanted)]
    simulation.run()
    for i, (request, p) in enumerate(zip(requests, wanted, strict=True)):
        assert request.answers[0].token_ids == simulation.expected([i, 2], p)
    assert len(requests[2].answers[0].token_ids) >= 7


def test_a_drafts_perfect_agreement_never_leaves_post_verify():
    target = FakeModel(1)
    simulation = Simulation(window=4, target=target, draft=target)
    request = simulation.controller.submit("r", None, [1], params(max_tokens=40, ignore_eos=True))
    simulation.run()
    answer = request.answers[0]
    assert answer.origins.count("residual") == 0
    assert answer.rounds["pre_verify"] == 1
    assert answer.origins[:2] == ["prefill", "pre_verify"] and set(answer.origins[2:]) == {"post_verify"}
    # 1 prefill token, 1 by the first round, then windows of 4: 38 tokens in 10 rounds
    assert answer.num_target_forwards == 11


def test_a_hopeless_draft_costs_no_more_rounds_than_ar():
    target = FakeModel(1)
    draft = target.blurred(5, 0.0)
    draft._table = -target._table
    rounds = {}
    for mode in ("pearl", "ar"):
        simulation = Simulation(mode=mode, window=4, target=target, draft=draft)
        request = simulation.controller.submit("r", None, [1], params(max_tokens=30, ignore_eos=True))
        simulation.run()
        rounds[mode] = request.answers[0].num_target_forwards
    assert rounds["pearl"] == rounds["ar"] == 29


def test_sd_commits_a_bonus_token_after_a_fully_accepted_window():
    target = FakeModel(1)
    simulation = Simulation(mode="sd", window=4, target=target, draft=target)
    request = simulation.controller.submit("r", None, [1], params(max_tokens=21, ignore_eos=True))
    simulation.run()
    assert request.answers[0].origins.count("bonus") == 4
    assert request.answers[0].num_target_forwards == 4


def test_prefill_chunks_long_prompts_and_leaves_room_for_short_ones():
    simulation = Simulation(max_num_batched_tokens=8, max_model_len=200, num_blocks=128)
    long_prompt = [i % 7 for i in range(100)]
    first = simulation.controller.submit("long", None, long_prompt, params())
    second = simulation.controller.submit("short", None, [1, 2, 3], params(max_tokens=1))
    simulation.collect()
    for _ in range(3):
        simulation.round()
        simulation.deliver_summary()
    assert second.finished and first.first_token_at is None
    simulation.run()
    assert first.answers[0].token_ids == simulation.expected(long_prompt, params())


def test_a_second_turn_finds_the_committed_blocks_of_the_first():
    simulation = Simulation(block_size=4)
    first = simulation.controller.submit("one", None, list(range(9)), params(ignore_eos=True))
    simulation.run()
    follow_up = list(range(9)) + first.answers[0].token_ids + [4, 5]
    rows = simulation.num_target_rows
    second = simulation.controller.submit("two", None, follow_up, params(max_tokens=1))
    simulation.run()
    assert simulation.num_target_rows - rows <= 4 + 3  # all but the last blocks were there
    assert second.answers[0].token_ids == simulation.expected(follow_up, params(max_tokens=1))
    assert simulation.pools[0].usage().hit_tokens >= 16


def test_running_out_of_blocks_preempts_and_changes_no_text():
    simulation = Simulation(num_blocks=14, block_size=4, max_model_len=40, window=3)
    asked = [
        (simulation.controller.submit(str(i), None, [i, 1], p), [i, 1], p)
        for i in range(5)
        for p in [params(max_tokens=30, ignore_eos=True, seed=i, temperature=0.7)]
    ]
    simulation.run()
    assert simulation.controller.statistics.preemptions > 0
    for request, prompt, p in asked:
        assert request.answers[0].token_ids == simulation.expected(prompt, p)
    simulation.assert_at_rest()


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    simulation = Simulation(num_blocks=4, block_size=4, max_model_len=64)
    with pytest.raises(RequestRefusedError, match=r"needs a cache of 22 tokens .* there are 16"):
        simulation.controller.submit("r", None, [1, 2], params(max_tokens=20))
    with pytest.raises(RequestRefusedError, match="64 tokens and max_model_len is 64"):
        simulation.controller.submit("r", None, [1] * 64, params())
    with pytest.raises(RequestRefusedError, match="empty"):
        simulation.controller.submit("r", None, [], params())
    with pytest.raises(RequestRefusedError, match="outside the vocabulary"):
        simulation.controller.submit("r", None, [VOCAB], params())
    with pytest.raises(ConfigError, match="stop_token_ids"):
        simulation.controller.submit("r", None, [1], params(stop_token_ids=(VOCAB,)))
    with pytest.raises(ConfigError, match="logit_bias"):
        simulation.controller.submit("r", None, [1], params(logit_bias={VOCAB: 1.0}))
    simulation.controller.submit("r", None, [1], params(max_tokens=None, ignore_eos=True))
    simulation.run()  # without max_tokens it takes what the cache holds
    simulation.assert_at_rest()


def test_a_full_queue_refuses_and_an_empty_one_takes():
    simulation = Simulation(max_num_seqs=1, max_waiting_requests=1)
    simulation.controller.submit("a", None, [1], params())
    simulation.controller.submit("b", None, [1], params())
    with pytest.raises(QueueFullError, match="1 sequences wait and max_waiting_requests is 1"):
        simulation.controller.submit("c", None, [1], params())
    simulation.run()
    simulation.controller.submit("c", None, [1], params())
    simulation.run()
    simulation.assert_at_rest()


def test_replicas_that_disagree_stop_the_round():
    simulation = Simulation()
    simulation.controller.submit("r", None, [1, 2], params())
    simulation.collect()
    simulation.round()
    simulation.round()
    wrong = simulation.summaries.popleft()
    simulation.summaries.appendleft(
        type(wrong)(**{f: getattr(wrong, f) for f in wrong.__struct_fields__} | {"checksum": 1})
    )
    with pytest.raises(ReplicaDivergedError):
        simulation.deliver_summary()


def test_n_answers_of_one_request_differ_and_each_is_reproducible():
    texts = []
    for mode in ("pearl", "ar"):
        simulation = Simulation(mode=mode)
        request = simulation.controller.submit("r", None, [1, 2], params(n=3, temperature=1.0, max_tokens=10))
        simulation.run()
        texts.append([tuple(answer.token_ids) for answer in request.answers])
        for index, answer in enumerate(request.answers):
            assert answer.token_ids == simulation.expected([1, 2], request.params, index)
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_a_request_may_choose_its_own_window_or_none():
    simulation = Simulation(window=4)
    wanted = [params(num_speculative_tokens=n, ignore_eos=True) for n in (None, 0, 2, 7)]
    requests = [simulation.controller.submit(str(i), None, [1, 2], p) for i, p in enumerate(wanted)]
    simulation.run()
    answers = [request.answers[0] for request in requests]
    assert len({tuple(a.token_ids) for a in answers}) == 1
    assert set(answers[1].origins) == {"prefill", "target"} and answers[1].num_drafted == 0
    assert answers[2].num_drafted < answers[0].num_drafted


class Machine(RuleBasedStateMachine):
    """Requests, aborts, rounds, late diffs and late summaries in any order, with few blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.simulation: Simulation | None = None
        self.asked: dict[str, tuple[object, list[int], SamplingParams]] = {}
        self.aborted: set[str] = set()
        self.ended: dict[str, int] = {}

    @precondition(lambda self: self.simulation is None)
    @rule(
        mode=st.sampled_from(MODES),
        window=st.integers(1, 5),
        num_blocks=st.integers(8, 24),
        block_size=st.integers(2, 5),
        budget=st.integers(6, 20),
        seqs=st.integers(1, 6),
    )
    def begin(self, mode, window, num_blocks, block_size, budget, seqs):
        self.simulation = Simulation(
            mode=mode,
            window=window,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=seqs,
            max_model_len=32,
        )

    @precondition(lambda self: self.simulation is not None)
    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14),
        max_tokens=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.6, 1.0]),
        seed=st.integers(0, 2**64 - 1),
        penalty=st.sampled_from([0.0, 0.8]),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 4),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    )
    def submit(self, prompt, max_tokens, temperature, seed, penalty, ignore_eos, min_tokens, stops):
        wanted = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            presence_penalty=penalty,
            ignore_eos=ignore_eos,
            min_tokens=min(min_tokens, max_tokens),
            stop_token_ids=tuple(stops),
        )
        name = f"r{len(self.asked)}"
        try:
            request = self.simulation.controller.submit(name, None, prompt, wanted)
        except RequestRefusedError:
            return
        self.asked[name] = (request, prompt, wanted)
        self.simulation.collect()

    @precondition(lambda self: self.simulation is not None)
    @rule(num_diffs=st.one_of(st.none(), st.integers(0, 2)))
    def round(self, num_diffs):
        self.simulation.round(num_diffs)

    @precondition(lambda self: self.simulation is not None)
    @rule()
    def hear(self):
        self.simulation.deliver_summary()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.asked)))
        if self.simulation.controller.abort(name):
            self.aborted.add(name)
            self.simulation.collect()

    @invariant()
    def committed_is_a_prefix_of_the_right_answer(self):
        for request, prompt, wanted in self.asked.values():
            tokens = request.answers[0].token_ids
            assert tokens == self.simulation.expected(prompt, wanted)[: len(tokens)]

    @invariant()
    def no_request_ends_twice(self):
        if self.simulation is None:
            return
        for update in self.simulation.updates:
            assert update.request_id not in self.ended, "an update after the end"
            if update.finish_reason is not None:
                self.ended[update.request_id] = 1
        self.simulation.updates.clear()

    def teardown(self):
        if self.simulation is None:
            return
        self.simulation.run()
        self.committed_is_a_prefix_of_the_right_answer()
        self.no_request_ends_twice()
        for name, (request, prompt, wanted) in self.asked.items():
            assert request.finished and name in self.ended
            if name not in self.aborted:
                assert request.answers[0].token_ids == self.simulation.expected(prompt, wanted)
        self.simulation.assert_at_rest()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
