"""How many tokens the draft should make per round. Numbers in, a number out: knows nothing of models or requests.

A round costs the slower of the two sides (PEARL), or their sum (SD, or both on one device), and brings a number of
tokens that follows from the acceptance rate; the window with the best ratio wins, and 0 (AR) wins where speculation
does not pay.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pearl_ray.core.costs import RoundCosts, StepCosts
from pearl_ray.core.phases import Mode

MAX_WINDOW = 32
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
# Where nobody drafts, and a round with drafting is dearer for all:
MOST_PROBE_ROUNDS = 256  # they are tried after twice as many rounds as the last time, up to these,
PROBED_TOKENS = 4096  # at once those who were AR for so many rounds together, for the draft lacks their tokens,
PROBED_ROUNDS = 5  # for so many rounds: the verdicts of the last two or three come too late to count;
HOPE = 0.05  # where their acceptance rises by so much, again at once


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
            self.fade()

    def fade(self) -> None:
        """What was seen so far counts half."""
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

    Attributes:
        costs: what rounds take (see ``core/costs.py``), to be told of every round; None: the windows are fixed.
    """

    def __init__(
        self,
        mode: Mode,
        fixed: int | None,
        measured: StepCosts | None,
        *,
        shares_device: bool = False,
        ahead_rows: int | None = None,
    ) -> None:
        assert fixed is not None or measured is not None or mode == "ar"
        self._fixed = 0 if mode == "ar" else fixed
        self.costs: RoundCosts | None = None
        if measured is not None:
            at_once = mode == "pearl"
            self.costs = RoundCosts(measured, at_once=at_once, shares_device=shares_device, ahead_rows=ahead_rows)
        self._overall = Acceptance(memory=8192.0)
        self._windows: dict[int, int] = {}
        self._asleep: list[int] = []  # the sequences whose window is 0
        self._rounds = self._next_review = 0
        self._next_probe = 0  # where all are asleep; 0: not set
        self._probe_rounds = PROBE_ROUNDS
        self._probed: dict[int, float] = {}  # those tried together since the last review, and their acceptance before
        self._first: tuple[tuple[object, ...], int] = ((), 0)
        self._tokens_AW, self._rows_AW = _tables(mode)

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

    def first_window(self, batch: int) -> int:
        """The window of a sequence that joins, with which the batch has ``batch`` sequences."""
        if self._fixed is not None or self.costs is None:
            return self._fixed or 0
        key = (batch.bit_length(), round(self.acceptance * ALPHA_LEVELS), *self.costs.key())
        if self._first[0] != key:
            self._first = (key, self._review(self.costs, [self.acceptance] * batch)[0])
        return self._first[1]

    def choose(self, sequences: Mapping[int, Acceptance]) -> Mapping[int, int]:
        """The window of every sequence, by id; looked at anew every few rounds, and when the batch changes.

        The answer is another object where it differs from the last one, and not to be written to.
        """
        changed = sequences.keys() != self._windows.keys()
        if self._fixed is not None or self.costs is None:
            if changed:
                self._windows = dict.fromkeys(sequences, self._fixed or 0)
            return self._windows
        self._rounds += 1
        if changed or self._rounds >= self._next_review:
            self._next_review = self._rounds + REVIEW_ROUNDS
            overall = self.acceptance
            alphas = [a.rate(overall, SEQUENCE_PRIOR_WEIGHT) for a in sequences.values()]
            windows = dict(zip(sequences, self._review(self.costs, alphas), strict=True))
            if windows != self._windows:
                self._windows = windows
            self._asleep = [seq_id for seq_id, window in self._windows.items() if window == 0]
            if len(self._asleep) < len(sequences):
                self._next_probe, self._probe_rounds = 0, PROBE_ROUNDS
            still = {seq_id: before for seq_id, before in self._probed.items() if seq_id in sequences}
            risen = sum([sequences[i].rate(overall, SEQUENCE_PRIOR_WEIGHT) - before for i, before in still.items()])
            if still and risen > HOPE * len(still):
                self._probe_rounds = REVIEW_ROUNDS
            self._probed = {}
        if self._asleep:
            probed = self._due(self.costs, sequences)
            if probed:
                self._windows = self._windows | dict.fromkeys(probed, PROBE_WINDOW)
                self._asleep = [seq_id for seq_id in self._asleep if self._windows[seq_id] == 0]
        return self._windows

    def _due(self, costs: RoundCosts, sequences: Mapping[int, Acceptance]) -> list[int]:
        """Who of those asleep is to be tried again. Beside others that draft it costs little, so each in its own time;
        where nobody does, a round for one is as dear as for several: those whose draft lacks least, together.
        """
        if self._probed:
            return []
        if costs.at_once or len(self._asleep) < len(sequences):
            return [seq_id for seq_id in self._asleep if sequences[seq_id].rounds_without >= PROBE_ROUNDS]
        if not self._next_probe:
            self._next_probe = self._rounds + self._probe_rounds
        if self._rounds < self._next_probe:
            return []
        self._next_probe, self._next_review = 0, self._rounds + PROBED_ROUNDS
        self._probe_rounds = min(2 * self._probe_rounds, MOST_PROBE_ROUNDS)
        overall, lacking = self.acceptance, 0
        for seq_id in sorted(self._asleep, key=lambda seq_id: sequences[seq_id].rounds_without):
            sequence = sequences[seq_id]
            lacking += sequence.rounds_without
            if self._probed and lacking > PROBED_TOKENS:
                break
            sequence.fade()
            self._probed[seq_id] = sequence.rate(overall, SEQUENCE_PRIOR_WEIGHT)
        return list(self._probed)

    def _review(self, costs: RoundCosts, alphas: list[float]) -> list[int]:
        """The windows for sequences of these acceptance rates.

        For every depth D: the windows up to D that are worth most at a price of 0 per row, the price that follows from
        the speed they give, the windows at that price, and so on. Shapes: A acceptance levels in use, W windows.
        """
        if not alphas:
            return []
        # Rounded to one of 1 … 19 twentieths: of 0 and 1 no tokens follow.
        levels = np.array(alphas) * ALPHA_LEVELS + 0.5
        levels = np.minimum(np.maximum(levels, 1), ALPHA_LEVELS - 1).astype(np.intp)
        counts_L = np.bincount(levels)
        used_A = counts_L.nonzero()[0]
        counts_A = counts_L[used_A].astype(float)
        all_A = np.arange(len(used_A))
        tokens_AW, rows_AW = self._tokens_AW[used_A], self._rows_AW[used_A]
        reachable_DAW = tokens_AW + _TOO_DEEP_DW[:, None, :]
        price_D: NDArray[np.float64] | None = None  # of a row
        steps: list[tuple[NDArray[np.intp], list[float]]] = []  # windows [D, A], speeds
        for _ in range(PRICE_STEPS):
            worth_DAW = reachable_DAW if price_D is None else reachable_DAW - price_D[:, None, None] * rows_AW
            chosen_DA = worth_DAW.argmax(axis=2)
            at = all_A, chosen_DA
            expected = costs.of(
                rows_AW[at] @ counts_A,
                (chosen_DA > 0) @ counts_A,
                chosen_DA.max(1),
                np.maximum(chosen_DA, 1) @ counts_A,
            )
            speed_D = (tokens_AW[at] @ counts_A) / expected.round_D
            steps.append((chosen_DA, speed_D.tolist()))
            price_D = speed_D * expected.row_D
            if not price_D.any():
                break  # rows are free: the windows stay
        best, windows_A = -1.0, steps[0][0][0]
        for depth in range(len(DEPTHS)):
            for chosen_DA, speeds in steps:
                if speeds[depth] > best * (GAIN_TO_DEEPEN if best > 0 else 1.0):
                    best, windows_A = speeds[depth], chosen_DA[depth]
        window_L = np.zeros(ALPHA_LEVELS, np.intp)
        window_L[used_A] = windows_A
        windows: list[int] = window_L[levels].tolist()
        return windows


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
