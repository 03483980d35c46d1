"""Every sampling field under both rules, by chi-square: the next three tokens are the target's own; twins that aren't.

The machine, its models and the enumeration of the right answer are ``tests.distribution``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from pearl_ray.core.params import SamplingParams
from pearl_ray.core.sampling import Row
from pearl_ray.core.verify import Segment, Verdict, verify
from tests.distribution import (
    VOCAB,
    Draw,
    Machine,
    Setting,
    counts_of,
    draws_of,
    exact_distribution,
    p_value,
)

pytestmark = pytest.mark.timeout(1200)  # the first of a group draws for all of them

FALSE_ALARM = 1e-9  # per comparison; there are fewer than a hundred
BROKEN = 1e-15
DRAWS = 20_000
TWIN_DRAWS = 4_000
STOPS = (2, 4)  # what min_tokens masks

SETTINGS = {
    "temperature": Setting("temperature", SamplingParams(temperature=0.6)),
    "top_p": Setting("top_p", SamplingParams(top_p=0.7)),
    "top_k": Setting("top_k", SamplingParams(top_k=2)),
    "min_p": Setting("min_p", SamplingParams(min_p=0.25)),
    "presence_penalty": Setting("presence_penalty", SamplingParams(presence_penalty=1.6)),
    "frequency_penalty": Setting("frequency_penalty", SamplingParams(frequency_penalty=-1.1)),
    "repetition_penalty": Setting("repetition_penalty", SamplingParams(repetition_penalty=2.5)),
    "logit_bias": Setting("logit_bias", SamplingParams(logit_bias={1: 2.0, 4: -3.0, 5: 1.0})),
    "min_tokens": Setting("min_tokens", SamplingParams(min_tokens=2), STOPS),
    "draft_temperature": Setting("draft_temperature", SamplingParams(draft_temperature=2.5)),
    "mixed": Setting(
        "mixed",
        SamplingParams(
            temperature=1.4,
            top_p=0.9,
            top_k=5,
            min_p=0.03,
            presence_penalty=-0.6,
            frequency_penalty=0.9,
            repetition_penalty=0.7,
            logit_bias={0: 0.7, 2: -1.0},
            min_tokens=1,
            draft_temperature=0.7,
        ),
        STOPS,
    ),
}
# What changes no distribution: where a text ends, what is reported, who drafts how much. Seeds differ in every draw,
# ``n`` is below, grammars have a file of their own.
NOT_DRAWN = {
    "n", "seed", "max_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "verification",
    "num_speculative_tokens", "structured_outputs",
}  # fmt: skip


def test_every_field_of_a_request_is_tried_here_or_changes_no_distribution() -> None:
    tried = set(SETTINGS) - {"mixed"}
    assert not tried & NOT_DRAWN
    assert tried | NOT_DRAWN == {field.name for field in fields(SamplingParams)}


def test_every_setting_moves_the_distribution_but_the_drafts_own() -> None:
    """Else a field that is ignored would pass."""
    plain = exact_distribution(Setting("plain", SamplingParams()))
    for name, setting in SETTINGS.items():
        moved = np.abs(exact_distribution(setting) - plain).sum() / 2
        assert moved == 0.0 if name == "draft_temperature" else moved > 0.1, (name, moved)


MACHINES: dict[str, Callable[[], Machine]] = {
    "pearl": lambda: Machine("pearl"),
    "sd": lambda: Machine("sd"),
    "ar": lambda: Machine("ar"),
    "pearl, windows end anywhere": lambda: Machine(
        "pearl", lambda number, i: (number + i // 2) % 5, drops=lambda number, i: (number + i) % 4 == 0
    ),
}


# Drawn in test_distribution.py already, in settings of its own: here again with the slow ones.
ELSEWHERE = ("temperature", "top_p", "top_k", "draft_temperature")
GROUPS = {"others": [name for name in SETTINGS if name not in ELSEWHERE], "again": list(ELSEWHERE)}


@functools.cache
def outputs(machine: str, group: str) -> list[Draw]:
    """A group's settings under both rules, in turn in one batch."""
    settings = [SETTINGS[name] for name in GROUPS[group]]
    draws = draws_of(settings, (False, True), DRAWS, engine_seed=11 + len(machine))
    MACHINES[machine]().run(draws)
    return draws


def _case(machine: str, group: str, name: str, rejection: bool) -> object:
    is_slow = machine != "pearl" or group == "again"
    marks = [pytest.mark.slow] if is_slow else []
    label = f"{machine}-{name}-{'rejection' if rejection else 'coupled'}"
    return pytest.param(machine, group, name, rejection, marks=marks, id=label)


@pytest.mark.parametrize(
    ("machine", "group", "name", "rejection"),
    [_case(m, g, name, r) for m in MACHINES for g, names in GROUPS.items() for name in names for r in (False, True)],
)
def test_with_any_field_the_next_three_tokens_follow_the_targets_own_distribution(
    machine: str, group: str, name: str, rejection: bool
) -> None:
    counts = counts_of(outputs(machine, group), SETTINGS[name], rejection)
    assert counts.sum() == DRAWS
    assert p_value(counts, exact_distribution(SETTINGS[name])) > FALSE_ALARM


# -- n answers of one request ---------------------------------------------------------------------------------------


class Answers(Machine):
    """Draws are the answers of requests with ``n`` = 4: these share a seed and differ in their sample index."""

    by_index = True

    def _row(self, draw: Draw, output: tuple[int, ...], *, grammar: bool) -> Row:
        row = Machine._row(self, draw, output, grammar=grammar)
        return replace(row, seed=draw.seed >> 2, sample_index=draw.seed & 3 if self.by_index else 0)


class SameAnswers(Answers):
    by_index = False


def pairs_of(machine: Machine, rejection: bool, count: int) -> np.ndarray:
    """The first tokens of two answers of each request, counted."""
    setting = Setting("n", SamplingParams(n=4))
    draws = [Draw(setting, rejection, 4 * i + index) for i in range(count) for index in (1, 2)]
    machine.run(draws)
    counts = np.zeros((VOCAB, VOCAB), int)
    np.add.at(counts, ([d.output[0] for d in draws[::2]], [d.output[0] for d in draws[1::2]]), 1)
    return counts


@pytest.mark.parametrize("rejection", [False, True], ids=["coupled", "rejection"])
def test_the_answers_of_one_request_are_independent_of_each_other(rejection: bool) -> None:
    first = exact_distribution(Setting("plain", SamplingParams())).sum((1, 2))
    exact = first[:, None] * first[None]
    assert p_value(pairs_of(Answers("pearl"), rejection, 2_500), exact) > FALSE_ALARM
    assert p_value(pairs_of(SameAnswers("pearl"), rejection, 1_000), exact) < BROKEN


# -- broken twins: one for each family of fields, under the rule or rules that it breaks ----------------------------


def _judge_with(
    change: Callable[[Segment, int, Row], Row],
) -> Callable[[torch.Tensor, Sequence[Segment]], list[Verdict]]:
    """The target's rows, each changed; by segment and place in the window."""

    def judge(logits: torch.Tensor, segments: Sequence[Segment]) -> list[Verdict]:
        changed = [replace(s, rows=tuple([change(s, i, row) for i, row in enumerate(s.rows)])) for s in segments]
        return verify(logits, changed, num_valid=VOCAB)

    return judge


def _without(*names: str) -> Callable[[Row], Row]:
    neutral = SamplingParams()
    return lambda row: replace(row, params=replace(row.params, **{name: getattr(neutral, name) for name in names}))


PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
no_penalties, no_bias, no_filters = _without(*PENALTIES), _without("logit_bias"), _without("top_k", "top_p", "min_p")


@dataclass(slots=True)
class DraftDiffers(Machine):
    """A draft that draws by one rule and reports another: its proposals carry the q of ``reported`` rows."""

    drawn: Callable[[Row], Row] = lambda row: row
    reported: Callable[[Row], Row] = lambda row: row

    def _draft(self, draws: Sequence[Draw], num_new: Sequence[int]) -> list[list[tuple[int, object, object]]]:
        made = self._made_by(self.drawn, draws, num_new)
        told = self._made_by(self.reported, draws, num_new)
        # What was drawn at the first place is told with the other's q; behind it the two have gone different ways.
        return [
            [(m[0], t[1], t[2]) for m, t in zip(own[:1], other[:1], strict=True)]
            for own, other in zip(made, told, strict=True)
        ]

    def _made_by(
        self, change: Callable[[Row], Row], draws: Sequence[Draw], num_new: Sequence[int]
    ) -> list[list[tuple[int, object, object]]]:
        twin = Changed(self.mode, change=change)
        return Machine._draft(twin, draws, [min(count, 1) for count in num_new])


@dataclass(slots=True)
class Changed(Machine):
    """Every row changed, the draft's and the target's."""

    change: Callable[[Row], Row] = lambda row: row

    def _row(self, draw: Draw, output: tuple[int, ...], *, grammar: bool) -> Row:
        return self.change(Machine._row(self, draw, output, grammar=grammar))


def _first_only(change: Callable[[Row], Row]) -> Machine:
    """The field counts at a window's first place only."""
    return Machine("pearl", lambda n, i: 3, judge=_judge_with(lambda s, i, row: change(row) if i else row))


def _committed_only(s: Segment, i: int, row: Row) -> Row:
    """Penalties count the committed tokens, not those of the window before."""
    return replace(row, output=tuple(row.output)[: len(row.output) - i])


def _mask_of_the_first(s: Segment, i: int, row: Row) -> Row:
    """min_tokens looks at the committed length for the whole window."""
    return replace(row, masked=s.rows[0].masked)


def _draft_reports(change: Callable[[Row], Row]) -> Machine:
    return DraftDiffers("pearl", reported=change)


def _targets_temperature(s: Segment, i: int, row: Row) -> Row:
    params = row.params
    return replace(row, params=replace(params, temperature=params.draft_temperature or params.temperature))


def _colder(row: Row) -> Row:
    return replace(row, params=replace(row.params, temperature=row.params.temperature / 2))


BOTH, REJECTION = (False, True), (True,)
TWINS: dict[str, tuple[Setting, tuple[bool, ...], Machine]] = {
    "penalties at a window's first place only": (SETTINGS["repetition_penalty"], BOTH, _first_only(no_penalties)),
    "presence that forgets the window": (
        SETTINGS["presence_penalty"],
        BOTH,
        Machine("pearl", lambda n, i: 3, judge=_judge_with(_committed_only)),
    ),
    "frequency that forgets the window": (
        SETTINGS["frequency_penalty"],
        BOTH,
        Machine("pearl", lambda n, i: 3, judge=_judge_with(_committed_only)),
    ),
    "q told without its penalties": (SETTINGS["repetition_penalty"], REJECTION, _draft_reports(no_penalties)),
    "bias at a window's first place only": (SETTINGS["logit_bias"], BOTH, _first_only(no_bias)),
    "bias on the draft only": (
        SETTINGS["logit_bias"],
        BOTH,
        Machine("pearl", judge=_judge_with(lambda s, i, row: no_bias(row))),
    ),
    "q told without its bias": (SETTINGS["logit_bias"], REJECTION, _draft_reports(no_bias)),
    "filters at a window's first place only": (SETTINGS["top_k"], BOTH, _first_only(no_filters)),
    "top_p on the draft only": (
        SETTINGS["top_p"],
        BOTH,
        Machine("pearl", judge=_judge_with(lambda s, i, row: no_filters(row))),
    ),
    "min_p on the draft only": (
        SETTINGS["min_p"],
        BOTH,
        Machine("pearl", judge=_judge_with(lambda s, i, row: no_filters(row))),
    ),
    "q told without its filters": (SETTINGS["min_p"], REJECTION, _draft_reports(no_filters)),
    "min_tokens by the committed length": (
        SETTINGS["min_tokens"],
        BOTH,
        Machine("pearl", lambda n, i: 3, judge=_judge_with(_mask_of_the_first)),
    ),
    "the draft's temperature on the target": (
        SETTINGS["draft_temperature"],
        BOTH,
        Machine("pearl", judge=_judge_with(_targets_temperature)),
    ),
    "q told at another temperature": (SETTINGS["temperature"], REJECTION, _draft_reports(_colder)),
}
CASES = [(name, rejection) for name, (_, rules, _) in TWINS.items() for rejection in rules]


@pytest.mark.parametrize(
    ("twin", "rejection"), CASES, ids=[f"{name}-{'rejection' if r else 'coupled'}" for name, r in CASES]
)
def test_the_same_test_sees_a_field_that_is_broken_on_purpose(twin: str, rejection: bool) -> None:
    setting, _, machine = TWINS[twin]
    draws = draws_of([setting], (rejection,), TWIN_DRAWS, engine_seed=3)
    machine.run(draws)
    assert p_value(counts_of(draws, setting, rejection), exact_distribution(setting)) < BROKEN


def test_the_machine_of_the_twins_is_right_where_nothing_is_broken() -> None:
    for machine in (DraftDiffers("pearl"), Machine("pearl", judge=_judge_with(lambda s, i, row: row))):
        draws = draws_of([SETTINGS["mixed"]], (True,), TWIN_DRAWS, engine_seed=3)
        machine.run(draws)
        found = p_value(counts_of(draws, SETTINGS["mixed"], True), exact_distribution(SETTINGS["mixed"]))
        assert found > FALSE_ALARM
