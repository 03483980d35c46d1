"""What a round costs beside the models, counted, not timed: it grows neither with the output nor with the batch."""

from __future__ import annotations

import gc
import sys
import tracemalloc

from benchmarks.bookkeeping import FakeRounds, words
from pearl_ray.core.costs import StepCosts
from pearl_ray.core.messages import RoundSummary, SequenceSummary
from pearl_ray.core.statistics import Newest, Statistics
from pearl_ray.core.windows import REVIEW_ROUNDS, Acceptance, WindowPolicy


def rounds(fake: FakeRounds, count: int) -> None:
    for _ in range(count):
        fake.round()


def calls_in(fake: FakeRounds, count: int) -> float:
    """Calls of functions, Python's and C's, per round in ``count`` rounds."""
    calls = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # finalizers of what other tests left behind are calls too
    sys.setprofile(note)
    try:
        rounds(fake, count)
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls / count


def bytes_of_a_round(fake: FakeRounds, repeats: int = 8) -> int:
    """Most memory in use at once in a round, over what was in use before; the least of some rounds (lists grow)."""
    peaks = []
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(repeats):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            fake.round()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return min(peaks)


def test_a_round_calls_as_much_per_sequence_in_a_large_batch_as_in_a_small_one():
    per_sequence = {}
    for batch in (16, 64):
        fake = FakeRounds(batch, stop=["never"])
        rounds(fake, 5)
        per_sequence[batch] = calls_in(fake, 2 * REVIEW_ROUNDS) / batch
    assert per_sequence[64] < 1.02 * per_sequence[16]
    assert per_sequence[64] < 200, per_sequence


def test_a_round_calls_and_copies_as_much_after_a_long_output_as_after_a_short_one():
    fake = FakeRounds(8, stop=["never"])
    rounds(fake, 20)
    calls = calls_in(fake, 4 * REVIEW_ROUNDS)
    copied = bytes_of_a_round(fake)
    begun = len(fake.controller.requests["r0"].answers[0].token_ids)
    rounds(fake, 700)
    later = len(fake.controller.requests["r0"].answers[0].token_ids)
    assert later > begun + 1000
    assert calls_in(fake, 4 * REVIEW_ROUNDS) < 1.05 * calls
    # One list of an answer's tokens alone would be 8 bytes for each.
    assert bytes_of_a_round(fake) < copied + 8 * (later - begun) / 2


def test_a_round_decodes_once_per_answer_and_a_bounded_number_of_tokens():
    asked: list[int] = []

    def decode(ids: list[int]) -> str:
        asked.append(len(ids))
        return words(ids)

    fake = FakeRounds(4, text_of=decode, stop=["never", "wordy"])
    rounds(fake, 10)
    asked.clear()
    rounds(fake, 300)
    new = sum(len(request.answers[0].token_ids) for request in fake.controller.requests.values())
    assert len(asked) < 1.4 * 4 * 300  # one each, and now and then one to drop old tokens from what is decoded
    assert sum(asked) < 10 * new and max(asked) <= 40


def test_windows_are_the_same_object_until_they_change():
    policy = WindowPolicy("pearl", None, StepCosts({1: 10.0, 128: 10.0}, {1: 2.0}))
    sequences = {0: Acceptance(), 1: Acceptance()}
    first = policy.choose(sequences)
    assert all(policy.choose(sequences) is first for _ in range(3 * REVIEW_ROUNDS))  # reviews that change nothing, too
    sequences[2] = Acceptance()
    assert policy.choose(sequences) is not first and policy.choose(sequences).keys() == sequences.keys()
    fixed = WindowPolicy("pearl", 3, None)
    assert fixed.choose(sequences) is fixed.choose(sequences)


def test_kept_rounds_are_bounded_in_bytes_and_come_back_as_they_were():
    def summary(number: int) -> RoundSummary:
        return RoundSummary(number, 1, 2, [SequenceSummary(5, [1, 2], 1, 9)], 0.0, 1.0, 0.5, 0.1, 3)

    newest = Newest(max_bytes=5000)
    for number in range(200):
        newest.append(summary(number))
    assert 5 < len(newest) < 40
    assert list(newest) == [summary(number) for number in range(200 - len(newest), 200)]


def test_accepted_tokens_are_counted_per_position():
    statistics = Statistics()
    statistics.count_verdicts([4, 0, 4], [3, 0, 1])
    statistics.count_verdicts([4], [1])
    assert dict(statistics.accepted_per_position) == {0: 3, 1: 1, 2: 1}
    assert (statistics.num_drafts, statistics.num_draft_tokens, statistics.num_accepted_tokens) == (3, 12, 5)
