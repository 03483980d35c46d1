"""What a round takes, for windows to be chosen by: measured at start, corrected by what rounds take. Seconds by rows,
sequences and draft steps; knows nothing of acceptance, nor of clocks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FREE_ROWS = 128  # that a GPU's forward pass takes at the price of one (DESIGN: "Measured before the start")
MEMORY = 0.05  # share of a round's time in the corrected costs,
SHARED_MEMORY = 0.2  # and in those of a shared device, each by how many steps the round had
MOST_COSTLY = 2.0  # a round counts as at most so many times the costs of before: it may have compiled a kernel
FORGET_ROUNDS = 1024  # what rounds with so many steps took on a shared device is forgotten after so many others


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


class _Curve:
    """:func:`_interpolate` of one table for many points at once, scaled."""

    def __init__(self, table: Mapping[int, float]) -> None:
        x: list[float] = sorted(table)
        y = [table[key] for key in sorted(table)]
        slope = 0.0 if len(x) == 1 else (y[-1] - y[-2]) / (x[-1] - x[-2])
        # One more point carries the last slope on: to where it ends at 0, or farther than any batch.
        far = y[-1] / -slope if slope < 0 else 1e9
        self._x = np.array([*x, x[-1] + far])
        self._y = np.array([*y, max(y[-1] + slope * far, 0.0)])

    def __call__(self, x: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
        seconds: NDArray[np.float64] = np.interp(x, self._x, self._y) * scale
        return seconds


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds that D different rounds take: ``round_D``, and what one more row would add to them.

    ``row_D`` is 0 where the target waits for the draft.
    """

    round_D: NDArray[np.float64]
    row_D: NDArray[np.float64]


class RoundCosts:
    """The warm-up's costs, and what rounds showed since.

    Where draft and target have devices of their own, a round takes the slower of the two (``at_once``), or their sum
    (SD); what each takes is corrected by a slowly moving ratio. Where they share a device they take its time from each
    other: what one takes in a round is the other's work too, so the sum is corrected, by the number of draft steps that
    the round had. (Two processes take turns on a GPU: one step more may cost next to nothing, or a whole turn.)

    ``ahead_rows``: windows that are more rows together keep passes from being queued ahead: the device then waits for
    the host between two of them, for as long as it was seen to. (On a shared device that is in what rounds take.)
    """

    def __init__(
        self, measured: StepCosts, *, at_once: bool, shares_device: bool = False, ahead_rows: int | None = None
    ) -> None:
        self._measured = measured
        self.at_once = at_once and not shares_device
        self.shares_device = shares_device
        self._ahead_rows = None if shares_device else ahead_rows
        self._target_curve, self._draft_curve = _Curve(measured.target_s), _Curve(measured.draft_s)
        self._target_ratio = self._draft_ratio = 1.0
        self._gap_s = 0.0
        self._shared: dict[int, tuple[float, int]] = {}  # by draft steps: ratio, when; the one seen longest ago first
        self._num_shared = 0
        self._steps_K, self._ratios_K = np.zeros(1), np.ones(1)  # the same, by steps

    def observe_target(self, rows: int, seconds: float) -> None:
        """A target forward of decoding rows took this long."""
        if rows and not self.shares_device:
            expected = self._measured.target(rows)
            self._target_ratio = _corrected(self._target_ratio, seconds / max(expected, 1e-9), MEMORY)

    def observe_draft(self, sequences: int, steps: int, seconds: float) -> None:
        """That many draft steps took this long, nothing but drafting."""
        if steps and not self.shares_device:
            expected = steps * self._measured.draft(sequences)
            self._draft_ratio = _corrected(self._draft_ratio, seconds / max(expected, 1e-9), MEMORY)

    def observe_gap(self, rows: int, seconds: float) -> None:
        """So long was no pass on the target's device before one whose longest windows are so many rows together."""
        if self._ahead_rows is not None and rows > self._ahead_rows:
            self._gap_s += (MEMORY if self._gap_s else 1.0) * (seconds - self._gap_s)

    def observe_round(self, rows: int, sequences: int, steps: int, seconds: float) -> None:
        """A round took this long, from the end of the one before, in which so many sequences drafted so many steps."""
        if not self.shares_device or not rows or seconds <= 0:
            return
        expected = self._measured.target(rows) + steps * self._measured.draft(sequences)
        ratio = _corrected(float(self._shared_ratio(np.array(steps))), seconds / max(expected, 1e-9), SHARED_MEMORY)
        self._num_shared += 1
        shared = self._shared
        shared.pop(steps, None)
        shared[steps] = ratio, self._num_shared
        while self._num_shared - next(iter(shared.values()))[1] > FORGET_ROUNDS:
            del shared[next(iter(shared))]
        ratios = {0: 1.0} | {steps: ratio for steps, (ratio, _) in shared.items()}
        self._steps_K = np.array(sorted(ratios), float)
        self._ratios_K = np.array([ratios[steps] for steps in sorted(ratios)])

    def _shared_ratio(self, steps_D: NDArray[np.intp]) -> NDArray[np.float64]:
        """By numbers of steps. One that wasn't seen is put halfway from a straight line between its neighbours to the
        one of fewer steps: where ratios rise with steps that is hopeful, and it is tried. Without steps: as measured.
        """
        smaller_D = self._ratios_K[self._steps_K.searchsorted(steps_D, "right") - 1]
        ratios_D: NDArray[np.float64] = (smaller_D + np.interp(steps_D, self._steps_K, self._ratios_K)) / 2
        return ratios_D

    def of(
        self,
        rows_D: NDArray[np.float64],
        drafting_D: NDArray[np.float64],
        steps_D: NDArray[np.intp],
        widest_D: NDArray[np.float64],
    ) -> Expected:
        """D rounds: the target's rows, the sequences that draft, the draft's steps, the windows' rows at the most."""
        target_s_D = self._target_curve(rows_D, self._target_ratio)
        row_s_D = self._target_curve(rows_D + 1, self._target_ratio) - target_s_D
        draft_s_D = steps_D * self._draft_curve(drafting_D, self._draft_ratio)
        if self.at_once:
            seconds_D = np.maximum(target_s_D, draft_s_D)
            row_s_D = np.where(draft_s_D <= target_s_D, row_s_D, 0.0)
        else:
            seconds_D = target_s_D + draft_s_D
        if self._shared:
            ratio_D = self._shared_ratio(steps_D)
            seconds_D, row_s_D = seconds_D * ratio_D, row_s_D * ratio_D
        if self._ahead_rows is not None and self._gap_s:
            seconds_D = seconds_D + self._gap_s * (widest_D > self._ahead_rows)
        return Expected(seconds_D, row_s_D)

    def one(self, rows: int, sequences: int, steps: int) -> float:
        """Seconds of one round."""
        at = np.array([rows]), np.array([sequences]), np.array([steps]), np.array([rows])
        return float(self.of(*at).round_D[0])

    def key(self) -> tuple[object, ...]:
        """Another one where the costs have moved by a tenth or so."""
        shared = tuple((steps, round(8 * math.log2(ratio))) for steps, (ratio, _) in sorted(self._shared.items()))
        return round(8 * math.log2(self._target_ratio / self._draft_ratio)), shared


def _corrected(ratio: float, observed: float, memory: float) -> float:
    """A cost's ratio after one more round. One that took far longer moves it little: it says nothing of the next."""
    return ratio + memory * (min(observed, MOST_COSTLY * ratio) - ratio)
