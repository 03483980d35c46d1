"""How fast long prompts may go while others decode. Numbers of rounds in, a pace out; knows no clock and no request.

A round with a chunk of a prompt takes longer than one without. What it takes more is the prefill's time, and that may
be at most a set part of all: so chunks are as large as pays, and as far apart as they must be.
"""

from __future__ import annotations

from pearl_ray.core.costs import MOST_COSTLY
from pearl_ray.core.schedule import MOST_ROUNDS, ROUND, Pace, Prefill

FIRST_TOKENS = 128  # a chunk before any was measured: a GPU's pass takes as many at next to no cost
LEAST_TOKENS = 32
STEP_TOKENS = 16
RESTING = ROUND + 1  # at the fastest one round in 17 is without a chunk, so that the cost of such a one stays known
STALL = 1.0  # a chunk may add this many rounds' time to its round, at least,
FIXED_PARTS = 3.0  # or so many times what any chunk adds, however small
TRIALS = 3  # chunks until there is an estimate: the least counts, one may have compiled a kernel
MEMORY = 0.125  # share of a round in the cost of one without chunks,
REST_MEMORY = 0.25  # while there are but few of those,
HINDRANCE_MEMORY = 0.03  # and in the ratio of the two,
HINDRANCE_PRIOR = 4  # of which 1 is believed so many rounds
MOST_HINDRANCE = 1.5
HINDRANCE_ROUNDS = 16  # of those since the first long prompt came, that tell the ratio; later it may be other things
ANOTHER_BATCH = 0.25  # so many more or fewer sequences that decode, in parts, and a round takes another time
MOST_CORRECTED = 0.5  # of the time that the prefill may take, at most, is added or withheld for that;
LEAST_PART = 0.25  # and it gets this part of it whatever else
LEDGER_ROUNDS = 32  # what was taken too much or too little is made good over so many rounds
HYSTERESIS = 0.12  # the pace isn't changed for less

# The chunk's cost as a Kalman filter sees it, in parts of the cost: how sure the first estimate is, how far either part
# of it wanders from chunk to chunk (contexts grow, and with them the price of a token), how much a round is off.
SURE, WANDERS_FIXED, WANDERS_TOKENS, NOISE = 0.5, 0.03, 0.04, 0.1


class ChunkCost:
    """Seconds that a chunk adds to a round, ``fixed + per_token * tokens``, as seen lately."""

    def __init__(self, tokens: int, seconds: float) -> None:
        seconds = max(seconds, 1e-9)
        self.fixed, self.per_token = seconds / 4, seconds * 3 / 4 / tokens
        self._var_fixed, self._var_token, self._covar = (SURE * seconds) ** 2, (SURE * seconds / tokens) ** 2, 0.0

    def of(self, tokens: float) -> float:
        """Seconds expected of so many tokens."""
        return self.fixed + self.per_token * tokens

    def observe(self, tokens: int, seconds: float, plain: float) -> None:
        """A chunk added so much to a ``plain`` round; what is far more is put down to something else."""
        expected = self.of(tokens)
        near = max((MOST_COSTLY - 1) * expected, MOST_COSTLY / 4 * plain)
        self._var_fixed += (WANDERS_FIXED * expected) ** 2
        self._var_token += (WANDERS_TOKENS * expected / tokens) ** 2
        gain_fixed = self._var_fixed + self._covar * tokens
        gain_token = self._covar + self._var_token * tokens
        variance = gain_fixed + gain_token * tokens + (NOISE * (plain + expected)) ** 2
        off = min(max(seconds - expected, -near), near)
        self.fixed = max(self.fixed + gain_fixed / variance * off, 0.0)
        self.per_token = max(self.per_token + gain_token / variance * off, 1e-12)
        self._var_fixed -= gain_fixed * gain_fixed / variance
        self._covar -= gain_fixed * gain_token / variance
        self._var_token -= gain_token * gain_token / variance


class PacingPolicy:
    """Chooses the pace at which running requests keep ``share`` of their speed; prompts together keep theirs.

    With L long prompts and D decoding sequences the prefill's part of the time is 1 - share, or L / (L + D) where that
    is more: one running request doesn't hold up 63 prompts. A round may then take d / (1 - part) on average, d being
    what it takes when no prompt waits. That is not quite what a round without a chunk takes between two with one
    (passes aren't queued ahead there), so the ratio of the two is learnt, and the prefill charged for it. Where other
    sequences decode than when d was seen, a round soon rests to see it anew.

    A chunk is as large as adds STALL · d, or FIXED_PARTS times the fixed part of its cost, or what a round may take
    anyway; the rounds from one to the next follow. As what was measured holds for the chunks of some rounds ago, the
    cost is estimated by their size, and a ledger of what was really taken corrects the rest.
    """

    def __init__(self, share: float, max_tokens: int) -> None:
        assert 0 <= share < 1
        self._share = share
        self._max_tokens = max_tokens
        self._pace = Pace(max_tokens)
        self._free_s = 0.0  # a round while no long prompt waits; 0: not known
        self._rest_s = 0.0  # a round without a chunk while one does
        self._ratio = self._hindrance = 1.0  # of the two; of what is believed of it
        self._free_decoding = 0  # sequences, in the rounds that it is of;
        self._num_decoding = 0  # in those that ``round_s`` is of
        self._num_rests = 0
        self._num_compared = 0
        self._trials: list[tuple[float, int]] = []
        self._cost: ChunkCost | None = None
        self._ledger_s = 0.0  # taken too much, since long prompts wait

    @property
    def round_s(self) -> float:
        """Seconds of a round if no prompt waited; 0: not known."""
        return self._rest_s / self._hindrance if self._rest_s else self._free_s

    def observe(self, seconds: float, num_decoding: int, prefill: Prefill | None) -> Pace:
        """A round took so long, from the end of the one before; returns the pace to go on with.

        It is another one only where long prompts wait, but for the very first. A round without decoding sequences says
        nothing.
        """
        if self._share == 0 or seconds <= 0 or num_decoding == 0:
            return self._pace
        is_stale = abs(num_decoding - self._num_decoding) > ANOTHER_BATCH * self._num_decoding
        if prefill is None or prefill.room == prefill.others == 0:
            self._observe_free(seconds, num_decoding, is_stale)
        elif prefill.rests:  # a prompt that is finished in its round is nobody's measure
            self._observe_rest(seconds, num_decoding, is_stale)
            is_stale = False
        elif self.round_s and not prefill.others and not is_stale:
            self._observe_chunk(seconds, prefill)
        if prefill is None or not prefill.room:
            return self._choose(FIRST_TOKENS, RESTING) if self._pace.every == ROUND else self._pace
        if not self.round_s:
            return self._choose(FIRST_TOKENS, 2 * ROUND)
        if is_stale:
            return self._choose(self._pace.tokens, max(self._pace.every, 2 * ROUND))
        share = min(self._share, num_decoding / (num_decoding + prefill.num_long))
        if not prefill.others:
            self._charge(seconds, share, prefill)
        if self._cost is None:
            return self._choose(FIRST_TOKENS, RESTING)
        return self._adapt(self._cost, share, prefill)

    def _observe_free(self, seconds: float, num_decoding: int, is_stale: bool) -> None:
        seconds = self._believed(seconds, self._free_s, num_decoding)
        self._free_s += (MEMORY if self._free_s and not is_stale else 1.0) * (seconds - self._free_s)
        self._num_decoding = self._free_decoding = num_decoding
        self._rest_s = self._ledger_s = 0.0
        self._num_rests = 0

    def _observe_rest(self, seconds: float, num_decoding: int, is_stale: bool) -> None:
        seconds = self._believed(seconds, self._hindrance * self.round_s, num_decoding)
        self._rest_s += (REST_MEMORY if self._rest_s and not is_stale else 1.0) * (seconds - self._rest_s)
        self._num_rests += 1
        self._num_decoding = num_decoding
        if self._free_s and num_decoding == self._free_decoding and self._num_rests <= HINDRANCE_ROUNDS:
            self._num_compared += 1
            seen = min(seconds / self._free_s, MOST_HINDRANCE)
            gain = max(HINDRANCE_MEMORY, 1 / (HINDRANCE_PRIOR + self._num_compared))
            self._ratio += gain * (seen - self._ratio)
            self._hindrance = max(self._ratio, 1.0)

    def _believed(self, seconds: float, expected: float, num_decoding: int) -> float:
        """What a round without a chunk counts for; ``expected``: of the batch of before, 0: not known."""
        more = max(num_decoding / self._num_decoding, 1.0) if self._num_decoding else 1.0
        return min(seconds, MOST_COSTLY * more * expected) if expected else seconds

    def _observe_chunk(self, seconds: float, prefill: Prefill) -> None:
        plain = self._hindrance * self.round_s
        extra = seconds - plain
        if self._cost is not None:
            self._cost.observe(prefill.tokens, extra, plain)
            return
        self._trials.append((extra, prefill.tokens))
        if len(self._trials) == TRIALS:
            extra, tokens = min(self._trials)
            self._cost = ChunkCost(tokens, extra)

    def _charge(self, seconds: float, share: float, prefill: Prefill) -> None:
        """Book what a round took over what it may take."""
        plain = self._hindrance * self.round_s
        if prefill.tokens:
            extra = self._cost.of(prefill.tokens) if self._cost is not None else seconds
            seconds = min(seconds, MOST_COSTLY * (plain + extra))
        else:
            seconds = min(seconds, MOST_COSTLY * plain)
        most = LEDGER_ROUNDS * MOST_CORRECTED * (1 / share - 1) * self.round_s
        self._ledger_s = min(max(self._ledger_s + seconds - self.round_s / share, -most), most)

    def _adapt(self, cost: ChunkCost, share: float, prefill: Prefill) -> Pace:
        plain = self._hindrance * self.round_s
        may = self.round_s / share - plain - self._ledger_s / LEDGER_ROUNDS
        may = max(may, LEAST_PART * (1 / share - 1) * self.round_s)
        extra = max(may, STALL * self.round_s, FIXED_PARTS * cost.fixed)
        tokens = (extra - cost.fixed) / cost.per_token
        tokens = min(max(tokens, prefill.tokens / 2), 2.0 * max(prefill.tokens, LEAST_TOKENS))
        tokens = tokens if prefill.tokens else float(self._pace.tokens)
        every = ROUND * cost.of(min(tokens, prefill.room)) / may
        return self._choose(tokens, every)

    def _choose(self, tokens: float, every: float) -> Pace:
        """Round and bound both; keep what was chosen before where that is about the same."""
        whole = round(tokens / STEP_TOKENS) * STEP_TOKENS
        bounded = min(max(whole, LEAST_TOKENS), self._max_tokens)
        pace = Pace(bounded, min(max(round(every), RESTING), MOST_ROUNDS * ROUND))
        old = self._pace
        if old.every == ROUND or not _near(pace.tokens, old.tokens) or not _near(pace.every, old.every):
            self._pace = pace
        return self._pace


def _near(new: int, old: int) -> bool:
    return abs(new - old) <= HYSTERESIS * old
