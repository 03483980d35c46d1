"""How many tokens the draft should make per round. Numbers in, a number out: knows nothing of models or requests.

A round costs the slower of the two sides (PEARL) or their sum (SD), and brings a number of tokens that follows from
the acceptance rate; the window with the best ratio wins, and 0 (AR) wins where speculation does not pay.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pearl_ray.core.phases import Mode

MAX_WINDOW = 32
DEPTHS = (0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
PRIOR_ACCEPTANCE = 0.7
PRIOR_WEIGHT = 64.0  # tests the prior counts for, in the engine's estimate
SEQUENCE_PRIOR_WEIGHT = 8.0  # tests the engine's estimate counts for in a sequence's own
ALPHA_LEVELS = 20
PRICE_STEPS = 3
GAIN_TO_DEEPEN = 1.01  # a deeper window must promise this much more: it also delays joins and stops
REVIEW_ROUNDS = 8
PROBE_ROUNDS = 64  # an AR sequence is tried again after so many rounds
PROBE_WINDOW = 3


def pearl_tokens_per_forward(alpha: float, gamma: int) -> float:
    """Expected committed tokens per target forward of PEARL at acceptance ``alpha``, independent per token.

    A round in PRE_VERIFY always commits one token and leads to POST_VERIFY with probability α. A round in POST_VERIFY
    tests γ tokens: it commits (1 − α^γ)/(1 − α) on average, the replacement counted, and stays with probability α^γ.
    With the stationary share of the two phases, π_pre = (1 − α^γ)/(1 − α^γ + α), the mean is
    (1 − α^γ) / ((1 − α)(1 − α^γ + α)).
    """
    if gamma == 0:
        return 1.0
    if alpha >= 1.0:
        return float(gamma)
    stay = alpha**gamma
    return (1 - stay) / ((1 - alpha) * (1 - stay + alpha))


def sd_tokens_per_forward(alpha: float, gamma: int) -> float:
    """Expected committed tokens per target forward of SD with its bonus token: (1 − α^(γ+1))/(1 − α)."""
    return float(gamma + 1) if alpha >= 1.0 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def share_of_post_verify(alpha: float, gamma: int) -> float:
    """The stationary share of PEARL's rounds that are in POST_VERIFY."""
    return alpha / (1 - alpha**gamma + alpha) if gamma > 0 else 0.0


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Measured seconds: a target forward by its query rows, a draft step by its sequences. Both at least one point."""

    target_s: Mapping[int, float]
    draft_s: Mapping[int, float]

    def target(self, rows: float) -> float:
        """Seconds of a target forward with that many rows, interpolated."""
        return _interpolate(self.target_s, rows)

    def draft(self, sequences: float) -> float:
        """Seconds of one draft step for that many sequences, interpolated."""
        return _interpolate(self.draft_s, sequences)


def _interpolate(table: Mapping[int, float], x: float) -> float:
    keys = sorted(table)
    at = bisect_left(keys, x)
    if at == 0:
        return table[keys[0]]
    if at == len(keys):
        # Beyond the last point every row costs what the last ones did; never less than proportionally flat.
        if len(keys) == 1:
            return table[keys[0]]
        low, high = keys[-2], keys[-1]
    else:
        low, high = keys[at - 1], keys[at]
    slope = (table[high] - table[low]) / (high - low)
    return max(table[low] + slope * (x - low), 0.0)


class Acceptance:
    """One sequence's recent acceptance, or the engine's: tests count less the older they are."""

    def __init__(self, memory: float = 96.0) -> None:
        self._memory = memory
        self._tested = 0.0
        self._accepted = 0.0
        self.rounds_without = 0  # rounds since a token was last tested

    def observe(self, num_tested: int, num_accepted: int) -> None:
        """A round's verdict; tests behind the first failure were never made, and the failure counts as one."""
        if num_tested == 0:
            self.rounds_without += 1
            return
        self.rounds_without = 0
        self._tested += min(num_accepted + 1, num_tested)
        self._accepted += num_accepted
        if self._tested > self._memory:
            self._tested /= 2
            self._accepted /= 2

    def rate(self, prior: float = PRIOR_ACCEPTANCE, weight: float = PRIOR_WEIGHT) -> float:
        """The estimate of α; ``prior`` counts for ``weight`` tests."""
        return (self._accepted + weight * prior) / (self._tested + weight)


class WindowPolicy:
    """Chooses each sequence's window from measured costs and observed acceptance, or keeps the one the user set.

    All sequences share a round, so the round's depth D (draft steps) is chosen for the batch and each sequence's window
    within it. A row of the target has a price: the seconds that one more row costs, times the tokens per second that
    the batch makes. A sequence's window is the w ≤ D with the largest expected tokens minus the price of its rows; the
    D with the most tokens per second wins. So where rows are free every window is as deep as the draft's time allows,
    where they are not the hopeful sequences keep theirs and the others fall to 0 (AR), to be probed now and then.

    Costs come from the warm-up and are corrected by what rounds really take (both sides contend for memory and cores),
    as a slowly moving ratio per side.
    """

    def __init__(self, mode: Mode, fixed: int | None, costs: StepCosts | None) -> None:
        assert fixed is not None or costs is not None or mode == "ar"
        self._mode: Mode = mode
        self._fixed = fixed
        self._costs = costs
        self._target_ratio = 1.0
        self._draft_ratio = 1.0
        self._overall = Acceptance(memory=8192.0)
        self._windows: dict[int, int] = {}
        self._rounds = 0
        self._first: tuple[tuple[int, ...], int] = ((), 0)
        self._tokens_AW, self._rows_AW = _tables(mode)

    @property
    def acceptance(self) -> float:
        """The running estimate of α over all sequences."""
        return self._overall.rate()

    def observe(self, sequence: Acceptance, num_tested: int, num_accepted: int) -> None:
        """Count a verdict for a sequence and for the engine."""
        sequence.observe(num_tested, num_accepted)
        self._overall.observe(num_tested, num_accepted)

    def observe_target(self, rows: int, seconds: float) -> None:
        """A target forward took this long."""
        if self._costs is not None and rows:
            self._target_ratio += 0.05 * (seconds / max(self._costs.target(rows), 1e-9) - self._target_ratio)

    def observe_draft(self, sequences: int, steps: int, seconds: float) -> None:
        """That many draft steps took this long."""
        if self._costs is not None and steps:
            self._draft_ratio += 0.05 * (seconds / max(steps * self._costs.draft(sequences), 1e-9) - self._draft_ratio)

    def first_window(self, batch: int) -> int:
        """The window of a sequence that joins, with which the batch has ``batch`` sequences."""
        if self._mode == "ar" or self._fixed is not None:
            return 0 if self._mode == "ar" else self._fixed or 0
        ratio = self._target_ratio / self._draft_ratio
        key = (batch.bit_length(), round(self.acceptance * ALPHA_LEVELS), round(8 * math.log2(ratio)))
        if self._first[0] != key:
            self._first = (key, self._review([self.acceptance] * batch)[0])
        return self._first[1]

    def choose(self, sequences: Mapping[int, Acceptance]) -> Mapping[int, int]:
        """The window of every sequence, by id; looked at anew every few rounds, and when the batch changes."""
        if self._mode == "ar" or self._fixed is not None:
            return dict.fromkeys(sequences, 0 if self._mode == "ar" else self._fixed or 0)
        self._rounds += 1
        if self._rounds % REVIEW_ROUNDS == 0 or sequences.keys() != self._windows.keys():
            overall = self.acceptance
            alphas = [a.rate(overall, SEQUENCE_PRIOR_WEIGHT) for a in sequences.values()]
            self._windows = dict(zip(sequences, self._review(alphas), strict=True))
        for seq_id, acceptance in sequences.items():
            if self._windows[seq_id] == 0 and acceptance.rounds_without >= PROBE_ROUNDS:
                self._windows[seq_id] = PROBE_WINDOW
        return self._windows

    def _review(self, alphas: list[float]) -> list[int]:
        """The windows for sequences of these acceptance rates."""
        if not alphas:
            return []
        costs = self.current_costs()
        levels = np.clip(np.rint(np.array(alphas) * ALPHA_LEVELS), 1, ALPHA_LEVELS - 1).astype(np.int64)
        counts = np.bincount(levels, minlength=ALPHA_LEVELS + 1)
        best, windows = -1.0, np.zeros(ALPHA_LEVELS + 1, np.int64)
        for depth in DEPTHS:
            price = 0.0
            for _ in range(PRICE_STEPS if depth else 1):
                worth = self._tokens_AW[:, : depth + 1] - price * self._rows_AW[:, : depth + 1]
                chosen = worth.argmax(axis=1)
                rows = float((counts * np.take_along_axis(self._rows_AW, chosen[:, None], 1)[:, 0]).sum())
                tokens = float((counts * np.take_along_axis(self._tokens_AW, chosen[:, None], 1)[:, 0]).sum())
                drafting = int(counts[chosen > 0].sum())
                steps = int(chosen[counts > 0].max(initial=0)) * costs.draft(drafting) if drafting else 0.0
                target = costs.target(rows)
                seconds = target + steps if self._mode == "sd" else max(target, steps)
                speed = tokens / seconds
                if speed > best * (GAIN_TO_DEEPEN if best > 0 else 1.0):
                    best, windows = speed, chosen
                if self._mode == "pearl" and steps > target:
                    break  # the target waits for the draft: its rows cost nothing
                price = speed * (costs.target(rows + 1) - target)
        return [int(windows[level]) for level in levels]

    def current_costs(self) -> StepCosts:
        """The warm-up's costs, corrected by what rounds take now."""
        assert self._costs is not None
        return StepCosts(
            {rows: s * self._target_ratio for rows, s in self._costs.target_s.items()},
            {batch: s * self._draft_ratio for batch, s in self._costs.draft_s.items()},
        )


def _tables(mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """Expected tokens and target rows per round, ``[alpha level, window]``; never for PEARL's window of 1."""
    shape = (ALPHA_LEVELS + 1, MAX_WINDOW + 1)
    tokens, rows = np.ones(shape), np.ones(shape)
    for level in range(ALPHA_LEVELS + 1):
        alpha = level / ALPHA_LEVELS
        for window in range(1, MAX_WINDOW + 1):
            if mode == "sd":
                tokens[level, window] = sd_tokens_per_forward(alpha, window)
                rows[level, window] = window + 1
            else:
                post = share_of_post_verify(alpha, window)
                tokens[level, window] = pearl_tokens_per_forward(alpha, window)
                rows[level, window] = 1 - post + post * window
    if mode == "pearl":
        tokens[:, 1] = 0.0  # it never leaves PRE_VERIFY and gains nothing over AR
    return tokens, rows
