"""How many tokens the draft should make per round. Numbers in, a number out: knows nothing of models or requests.

A round costs the slower of the two sides (PEARL) or their sum (SD), and brings a number of tokens that follows from
the acceptance rate; the window with the best ratio wins, and 0 (AR) wins where speculation does not pay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from pearl_ray.core.phases import Mode

MAX_WINDOW = 32
PRIOR_ACCEPTANCE = 0.7
PRIOR_WEIGHT = 64.0  # tested tokens the prior counts for
GAIN_TO_CHANGE = 1.05  # a new window must promise this much more: otherwise noise would swing it


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


def tokens_per_second(mode: Mode, window: int, alpha: float, batch: int, costs: StepCosts) -> float:
    """What ``batch`` sequences would commit per second with this window."""
    if window == 0 or mode == "ar":
        return batch / costs.target(batch)
    drafting = window * costs.draft(batch)
    if mode == "sd":
        return batch * sd_tokens_per_forward(alpha, window) / (costs.target(batch * (window + 1)) + drafting)
    post = share_of_post_verify(alpha, window)
    rows = batch * ((1 - post) + post * window)
    # At batch 1 a round is either phase; in a large batch it is a mix of both.
    if batch == 1:
        seconds = (1 - post) * max(costs.target(1), drafting) + post * max(costs.target(window), drafting)
    else:
        seconds = max(costs.target(rows), drafting)
    return batch * pearl_tokens_per_forward(alpha, window) / seconds


def best_window(mode: Mode, alpha: float, batch: int, costs: StepCosts, *, max_window: int = MAX_WINDOW) -> int:
    """The window that commits the most tokens per second, 0 where AR does."""
    if mode == "ar":
        return 0
    candidates = range(max_window + 1)
    # PEARL with a window of 1 never leaves PRE_VERIFY and gains nothing.
    return max(
        (w for w in candidates if not (mode == "pearl" and w == 1)),
        key=lambda w: tokens_per_second(mode, w, alpha, batch, costs),
    )


class WindowPolicy:
    """Chooses the batch's window from measured costs and observed acceptance, or keeps the one the user set.

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
        self._tested = PRIOR_WEIGHT
        self._accepted = PRIOR_WEIGHT * PRIOR_ACCEPTANCE
        self._window = 0
        self._batch = 0

    @property
    def acceptance(self) -> float:
        """The running estimate of α."""
        return self._accepted / self._tested

    def observe_tests(self, num_tested: int, num_accepted: int) -> None:
        """Count tests; old ones fade, so that a change of text is followed."""
        # Tests behind the first failure were never made: a failure counts as one test.
        made = min(num_accepted + 1, num_tested)
        self._tested += made
        self._accepted += num_accepted
        if self._tested > 8192:
            self._tested /= 2
            self._accepted /= 2

    def observe_target(self, rows: int, seconds: float) -> None:
        """A target forward took this long."""
        if self._costs is not None and rows:
            self._target_ratio += 0.05 * (seconds / max(self._costs.target(rows), 1e-9) - self._target_ratio)

    def observe_draft(self, sequences: int, steps: int, seconds: float) -> None:
        """That many draft steps took this long."""
        if self._costs is not None and steps:
            self._draft_ratio += 0.05 * (seconds / max(steps * self._costs.draft(sequences), 1e-9) - self._draft_ratio)

    def window(self, batch: int) -> int:
        """The window for a batch of that many sequences."""
        if self._mode == "ar" or batch == 0:
            return 0
        if self._fixed is not None:
            return self._fixed
        costs = self.current_costs()
        best = best_window(self._mode, self.acceptance, batch, costs)
        now = tokens_per_second(self._mode, self._window, self.acceptance, batch, costs)
        promised = tokens_per_second(self._mode, best, self.acceptance, batch, costs)
        if batch != self._batch or promised > GAIN_TO_CHANGE * now:
            self._window, self._batch = best, batch
        return self._window

    def current_costs(self) -> StepCosts:
        """The warm-up's costs, corrected by what rounds take now."""
        assert self._costs is not None
        return StepCosts(
            {rows: s * self._target_ratio for rows, s in self._costs.target_s.items()},
            {batch: s * self._draft_ratio for batch, s in self._costs.draft_s.items()},
        )
