"""How many tokens the draft should make per round. Numbers in, a number out: knows nothing of models or requests.

A round costs the slower of the two sides (PEARL), or their sum (SD, or both on one device), and brings a number of
tokens that follows from the acceptance rate; the window with the best ratio wins, and 0 (AR) wins where speculation
does not pay.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pearl_ray.core.phases import Mode

MAX_WINDOW = 32
FREE_ROWS = 128  # that a GPU's forward pass takes at the price of one (DESIGN: "Measured before the start")
DEPTHS = (0, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
PRIOR_ACCEPTANCE = 0.7
PRIOR_WEIGHT = 64.0  # tests the prior counts for, in the engine's estimate
SEQUENCE_PRIOR_WEIGHT = 8.0  # tests the engine's estimate counts for in a sequence's own
ALPHA_LEVELS = 20
PRICE_STEPS = 3
_TOO_DEEP_DW = np.where(np.arange(MAX_WINDOW + 1) > np.array(DEPTHS)[:, None], -np.inf, 0.0)
GAIN_TO_DEEPEN = 1.01  # a deeper window must promise this much more: it also delays joins and stops
REVIEW_ROUNDS = 8
PROBE_ROUNDS = 64  # an AR sequence is tried again after so many rounds
PROBE_WINDOW = 3
COST_MEMORY = 0.05  # share of a round's time in the corrected costs
MOST_COSTLY = 2.0  # a round counts as at most so many times the costs of before: it may have compiled a kernel


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


def _corrected(ratio: float, observed: float) -> float:
    """A cost's ratio after one more round. One that took far longer moves it little: it says nothing of the next."""
    return ratio + COST_MEMORY * (min(observed, MOST_COSTLY * ratio) - ratio)


class _Curve:
    """:func:`_interpolate` of one table for many points at once, scaled."""

    def __init__(self, table: Mapping[int, float]) -> None:
        keys = sorted(table)
        self._x = np.array(keys, float)
        self._y = np.array([table[key] for key in keys], float)
        self._slope = 0.0 if len(keys) == 1 else (self._y[-1] - self._y[-2]) / (self._x[-1] - self._x[-2])

    def __call__(self, x: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
        beyond = np.maximum(x - self._x[-1], 0.0) * self._slope
        seconds: NDArray[np.float64] = np.maximum(np.interp(x, self._x, self._y) + beyond, 0.0) * scale
        return seconds


class Acceptance:
    """One sequence's recent acceptance, or the engine's: tests count less the older they are."""

    __slots__ = ("_accepted", "_memory", "_tested", "rounds_without")

    def __init__(self, memory: float = 96.0) -> None:
        self._memory = memory
        self._tested = 0.0
        self._accepted = 0.0
        self.rounds_without = 0  # rounds since a token was last tested

    def observe(self, num_tested: int, num_accepted: int) -> int:
        """A round's verdict; tests behind the first failure were never made, and the failure counts as one.

        Returns how many tests were made.
        """
        if num_tested == 0:
            self.rounds_without += 1
            return 0
        self.rounds_without = 0
        made = num_accepted + 1 if num_accepted < num_tested else num_tested
        self.add(made, num_accepted)
        return made

    def add(self, num_made: int, num_accepted: int) -> None:
        """That many tests were made, that many of them passed."""
        self._tested += num_made
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
    as a slowly moving ratio per side. Where both share a device (``shares_device``) they take its time from each other:
    a round costs their sum, as measured in the warm-up, for what one takes in a round is the other's work too. Windows
    that are more than ``ahead_rows`` together keep passes from being queued ahead: the device then waits for the host
    between two of them, for as long as it was seen to.
    """

    def __init__(
        self,
        mode: Mode,
        fixed: int | None,
        costs: StepCosts | None,
        *,
        shares_device: bool = False,
        ahead_rows: int | None = None,
    ) -> None:
        assert fixed is not None or costs is not None or mode == "ar"
        self._mode: Mode = mode
        self._fixed = fixed
        self._costs = costs
        self._shares_device = shares_device
        self._ahead_rows = ahead_rows
        self._host_s = 0.0
        self._target_ratio = 1.0
        self._draft_ratio = 1.0
        self._overall = Acceptance(memory=8192.0)
        self._windows: dict[int, int] = {}
        self._asleep: list[int] = []  # the sequences whose window is 0
        self._rounds = 0
        self._first: tuple[tuple[int, ...], int] = ((), 0)
        self._tokens_AW, self._rows_AW = _tables(mode)
        if costs is not None:
            self._target_curve, self._draft_curve = _Curve(costs.target_s), _Curve(costs.draft_s)

    @property
    def acceptance(self) -> float:
        """The running estimate of α over all sequences."""
        return self._overall.rate()

    def observe(self, sequence: Acceptance, num_tested: int, num_accepted: int) -> None:
        """Count a verdict for a sequence and for the engine."""
        self.observe_round(sequence.observe(num_tested, num_accepted), num_accepted)

    def observe_round(self, num_made: int, num_accepted: int) -> None:
        """Count the tests that a round made, all sequences together, and how many passed, for the engine."""
        self._overall.add(num_made, num_accepted)

    def observe_target(self, rows: int, seconds: float) -> None:
        """A target forward of decoding rows took this long."""
        if self._costs is not None and rows and not self._shares_device:
            self._target_ratio = _corrected(self._target_ratio, seconds / max(self._costs.target(rows), 1e-9))

    def observe_draft(self, sequences: int, steps: int, seconds: float) -> None:
        """That many draft steps took this long, nothing but drafting."""
        if self._costs is not None and steps and not self._shares_device:
            expected = max(steps * self._costs.draft(sequences), 1e-9)
            self._draft_ratio = _corrected(self._draft_ratio, seconds / expected)

    def observe_gap(self, rows: int, seconds: float) -> None:
        """So long was no pass on the target's device before one whose longest windows are so many rows together."""
        if self._ahead_rows is not None and rows > self._ahead_rows:
            self._host_s += (COST_MEMORY if self._host_s else 1.0) * (seconds - self._host_s)

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
        """The window of every sequence, by id; looked at anew every few rounds, and when the batch changes.

        The answer is another object where it differs from the last one, and not to be written to.
        """
        changed = sequences.keys() != self._windows.keys()
        if self._mode == "ar" or self._fixed is not None:
            if changed:
                self._windows = dict.fromkeys(sequences, 0 if self._mode == "ar" else self._fixed or 0)
            return self._windows
        self._rounds += 1
        if changed or self._rounds % REVIEW_ROUNDS == 0:
            overall = self.acceptance
            alphas = [a.rate(overall, SEQUENCE_PRIOR_WEIGHT) for a in sequences.values()]
            windows = dict(zip(sequences, self._review(alphas), strict=True))
            if windows != self._windows:
                self._windows = windows
            self._asleep = [seq_id for seq_id, window in self._windows.items() if window == 0]
        if self._asleep:
            probed = [seq_id for seq_id in self._asleep if sequences[seq_id].rounds_without >= PROBE_ROUNDS]
            if probed:
                self._windows = self._windows | dict.fromkeys(probed, PROBE_WINDOW)
                self._asleep = [seq_id for seq_id in self._asleep if self._windows[seq_id] == 0]
        return self._windows

    def _review(self, alphas: list[float]) -> list[int]:
        """The windows for sequences of these acceptance rates.

        For every depth D: the windows up to D that are worth most at a price of 0 per row, the price that follows from
        the speed they give, the windows at that price, and so on. Shapes: A acceptance levels in use, W windows.
        """
        if not alphas:
            return []
        levels = np.clip(np.rint(np.array(alphas) * ALPHA_LEVELS), 1, ALPHA_LEVELS - 1).astype(np.int64)
        used_A, of_level, counts_A = np.unique(levels, return_inverse=True, return_counts=True)
        tokens_AW, rows_AW = self._tokens_AW[used_A], self._rows_AW[used_A]
        reachable_DAW = tokens_AW + _TOO_DEEP_DW[:, None, :]
        at_once = self._mode == "pearl" and not self._shares_device
        price_D = np.zeros(len(DEPTHS))
        steps: list[tuple[NDArray[np.intp], list[float], list[bool]]] = []  # windows [D, A], speeds, whether rows cost
        for _ in range(PRICE_STEPS):
            chosen_DA = (reachable_DAW - price_D[:, None, None] * rows_AW).argmax(axis=2)
            at = np.arange(len(used_A)), chosen_DA
            rows_D, tokens_D = (counts_A * rows_AW[at]).sum(1), (counts_A * tokens_AW[at]).sum(1)
            drafting_D = ((chosen_DA > 0) * counts_A).sum(1).astype(float)
            draft_s_D = chosen_DA.max(1) * self._draft_curve(drafting_D, self._draft_ratio)
            target_s_D = self._target_curve(rows_D, self._target_ratio)
            seconds_D = np.maximum(target_s_D, draft_s_D) if at_once else target_s_D + draft_s_D
            if self._ahead_rows is not None:
                widest_D = (counts_A * np.maximum(chosen_DA, 1)).sum(1)
                seconds_D = seconds_D + self._host_s * (widest_D > self._ahead_rows)
            speed_D = tokens_D / seconds_D
            # Where the target waits for the draft its rows cost nothing.
            costly_D = (draft_s_D <= target_s_D) if at_once else np.ones(len(DEPTHS), bool)
            steps.append((chosen_DA, speed_D.tolist(), costly_D.tolist()))
            if not any(steps[-1][2]):
                break
            price_D = speed_D * (self._target_curve(rows_D + 1, self._target_ratio) - target_s_D)
            if not price_D.any():
                break  # rows are free: the windows stay
        best, windows_A = -1.0, steps[0][0][0]
        for depth in range(len(DEPTHS)):
            for chosen_DA, speeds, costly in steps:
                if speeds[depth] > best * (GAIN_TO_DEEPEN if best > 0 else 1.0):
                    best, windows_A = speeds[depth], chosen_DA[depth]
                if not costly[depth] or depth == 0:
                    break
        windows: list[int] = windows_A[of_level].tolist()
        return windows

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
