"""Who joins the batch next: first come, first served; what doesn't fit is overtaken for a while only."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pearl_ray.core.params import SamplingParams
from pearl_ray.core.requests import Answer, make_request
from pearl_ray.core.waiting import LOOK_AHEAD, PATIENCE_ROUNDS, WaitingQueue
from tests.simulation import Simulation

BUSY_ROUNDS = PATIENCE_ROUNDS + 40  # in which requests keep coming


def answer(size: int) -> Answer:
    """One that holds ``size`` units of room."""
    request = make_request(
        "r",
        None,
        [1] * size,
        SamplingParams(),
        seed=0,
        rejection=False,
        eos_token_ids=frozenset(),
        max_total=size + 1,
        decode=str,
        now=0.0,
    )
    return request.answers[0]


def size_of(waiting: Answer) -> int:
    return len(waiting.request.prompt_ids)


@dataclass
class Room:
    """A batch with so many units of room; ``joined``: who joined, and in which round."""

    free: int
    queue: WaitingQueue = field(default_factory=WaitingQueue)
    joined: list[tuple[Answer, int]] = field(default_factory=list)
    refused: dict[int, int] = field(default_factory=dict)  # by id, the first round in which it didn't fit
    num_asked: int = 0

    def fits(self, waiting: Answer, number: int) -> bool:
        self.num_asked += 1
        fits = size_of(waiting) <= self.free
        if not fits:
            self.refused.setdefault(id(waiting), number)
        return fits

    def admit(self, number: int) -> list[Answer]:
        new = []
        while (taken := self.queue.take(lambda a: self.fits(a, number), number)) is not None:
            self.free -= size_of(taken)
            new.append(taken)
        self.joined += [(taken, number) for taken in new]
        return new


def test_first_come_is_first_served():
    room = Room(free=10)
    answers = [answer(size) for size in (3, 1, 4, 2)]
    room.queue.extend(answers)
    assert room.admit(0) == answers and len(room.queue) == 0


def test_small_ones_pass_a_large_one_until_its_patience_ends():
    room = Room(free=1)
    large = answer(2)
    room.queue.extend([large])
    for number in range(PATIENCE_ROUNDS + 5):
        small = answer(1)
        room.queue.extend([small])
        if room.admit(number):
            room.free += 1  # the small one ends at once; there are never two units at a time
    assert [number for _, number in room.joined] == list(range(PATIENCE_ROUNDS))
    assert all(taken is not large for taken, _ in room.joined)
    room.free = 2
    assert room.admit(PATIENCE_ROUNDS + 5) == [large]


def test_nobody_passes_a_preempted_one_and_it_comes_before_all_others():
    room = Room(free=1)
    first, small, preempted = answer(1), answer(1), answer(3)
    room.queue.extend([first, small])
    room.queue.put_back(preempted)
    assert room.admit(0) == []
    room.free = 4
    assert room.admit(1) == [preempted, first]


def test_two_preempted_ones_keep_their_age():
    room = Room(free=0)
    older, younger, newcomer = answer(1), answer(1), answer(1)
    room.queue.extend([newcomer])
    room.queue.put_back(younger)  # the youngest is preempted first
    room.queue.put_back(older)
    room.free = 3
    assert room.admit(0) == [older, younger, newcomer]


def test_an_aborted_one_leaves_the_queue():
    room = Room(free=5)
    stays, goes = answer(1), answer(9)
    room.queue.extend([goes, stays])
    room.queue.remove(goes)
    assert room.admit(0) == [stays] and len(room.queue) == 0


def test_a_long_queue_costs_no_more_questions_than_a_short_one():
    room = Room(free=1)
    room.queue.extend([answer(2) for _ in range(500)])
    assert room.admit(0) == [] and room.num_asked == LOOK_AHEAD


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_everyone_joins_within_a_bounded_number_of_rounds_and_in_order_but_for_the_patience(data):
    capacity, longest = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 8))
    room = Room(free=capacity)
    running: list[tuple[Answer, int]] = []
    order: list[Answer] = []
    arrived: dict[int, int] = {}
    arrivals = st.lists(st.sampled_from([1, 1, 1, 2, capacity // 2 + 1, capacity]), max_size=3)
    number = 0
    while number < BUSY_ROUNDS or len(room.queue):
        ended = [taken for taken, end in running if end <= number]
        running = [(taken, end) for taken, end in running if end > number]
        room.free += sum(map(size_of, ended))
        if number < BUSY_ROUNDS:
            new = [answer(size) for size in data.draw(arrivals)] if number % 5 == 0 else [answer(1)]
            room.queue.extend(new)
            order += new
            arrived.update((id(a), number) for a in new)
        running += [(taken, number + 1 + (7 * number + size_of(taken)) % longest) for taken in room.admit(number)]
        number += 1
        assert number < 10_000, "somebody waits for ever"
    place = {id(a): index for index, a in enumerate(order)}
    joined = {id(a): at for a, at in room.joined}
    assert joined.keys() == place.keys()
    for late, (taken, at) in enumerate(room.joined):
        for other, _ in room.joined[late + 1 :]:
            if place[id(other)] < place[id(taken)]:  # it was overtaken
                assert at - room.refused[id(other)] < PATIENCE_ROUNDS
    # Whoever is first in line joins once its patience and the running ones' rounds are over: so does the n-th, n times.
    for a in order:
        ahead = sum(joined[id(b)] >= arrived[id(a)] for b in order[: place[id(a)]])
        assert joined[id(a)] - arrived[id(a)] <= (ahead + 1) * (PATIENCE_ROUNDS + longest)


@pytest.mark.parametrize("mode", ["pearl", "ar"])
def test_a_large_request_joins_though_small_ones_keep_coming(mode):
    simulation = Simulation(mode=mode, window=2, num_blocks=24, block_size=4, max_num_seqs=8, max_model_len=96)
    small = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=1)
    large = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=2)
    prompt = [1 + i % 7 for i in range(64)]
    request, others = None, []
    for number in range(4 * PATIENCE_ROUNDS):
        if number % 3 == 0:
            others.append(simulation.controller.submit(f"s{number}", None, [1, number % 9], small))
        if number == 20:
            request = simulation.controller.submit("large", None, prompt, large)
        simulation.collect()
        simulation.round()
        simulation.deliver_summary()
        if request is not None and request.answers[0].seq_id is not None:
            break
    assert request is not None and request.answers[0].seq_id is not None
    assert PATIENCE_ROUNDS <= number - 20 < 2 * PATIENCE_ROUNDS
    simulation.run()
    assert request.answers[0].token_ids == simulation.expected(prompt, large)
    assert all(other.finished for other in others)
    simulation.assert_at_rest()
