"""The speculative machine as one simple loop over thousands of independent draws, and the exact answer to hold it to.

Untrained table models over a tiny vocabulary; the exact distribution of the next tokens is enumerated by code that
shares nothing with ``pearl_ray``. Hooks let a test break a rule on purpose.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import stats

from pearl_ray.core.params import SamplingParams
from pearl_ray.core.rng import request_seed
from pearl_ray.core.sampling import Row, coupled_tokens, propose
from pearl_ray.core.verify import Segment, Verdict, verify

VOCAB, PADDED, NUM_TOKENS, PROMPT = 6, 8, 3, (1, 4, 2, 4)
Node = tuple[int, np.ndarray | None, np.ndarray | None]  # token, proposal ids, proposal probabilities
Judge = Callable[[torch.Tensor, Sequence[Segment]], list[Verdict]]


class TableModel:
    """Logits by (length mod 4, last two tokens); the ids from VOCAB to PADDED are padding with large logits."""

    def __init__(self, seed: int, scale: float, near: TableModel | None = None) -> None:
        table = np.random.default_rng(seed).normal(size=(4, PADDED, PADDED, PADDED)) * scale
        self.table: np.ndarray = (table + (near.table if near else 0.0)).astype(np.float32)
        self.table[..., VOCAB:] = 9.0

    def logits(self, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        at = np.array([(len(p) % 4, p[-2], p[-1]) for p in prefixes])
        return torch.from_numpy(self.table[at[:, 0], at[:, 1], at[:, 2]])


TARGET = TableModel(1, 1.3)
DRAFT = TableModel(2, 0.9, near=TARGET)


@dataclass(frozen=True, slots=True)
class Setting:
    """A request's parameters; ``stop`` is masked below ``min_tokens``; ``grammar`` allows ids by the token before."""

    name: str
    params: SamplingParams
    stop: tuple[int, ...] = ()
    grammar: tuple[torch.Tensor, ...] | None = None


def exact_distribution(setting: Setting) -> np.ndarray:
    """The probability of each triple of next tokens, ``[VOCAB] * NUM_TOKENS``, straight from the definitions."""
    exact = np.zeros((VOCAB,) * NUM_TOKENS)
    for tokens in itertools.product(range(VOCAB), repeat=NUM_TOKENS):
        exact[tokens] = math.prod(_next_token(setting, list(tokens[:i]))[t] for i, t in enumerate(tokens))
    return exact


def _next_token(setting: Setting, output: list[int]) -> np.ndarray:
    params, tokens = setting.params, [*PROMPT, *output]
    x = [float(v) for v in TARGET.table[len(tokens) % 4, tokens[-2], tokens[-1], :VOCAB]]
    for v in range(VOCAB):
        if v in tokens:
            x[v] = x[v] / params.repetition_penalty if x[v] > 0 else x[v] * params.repetition_penalty
        x[v] -= params.frequency_penalty * output.count(v) + params.presence_penalty * (v in output)
        x[v] += params.logit_bias.get(v, 0.0)
    able = [v for v in range(VOCAB) if not (len(output) < params.min_tokens and v in setting.stop)]
    able = [v for v in able if setting.grammar is None or setting.grammar[tokens[-1]][v]]
    able.sort(key=lambda v: (-x[v], v))
    p = np.zeros(VOCAB)
    if params.temperature == 0.0:
        p[able[0]] = 1.0
        return p
    able = able[: params.top_k or VOCAB]
    weight = {v: math.exp((x[v] - x[able[0]]) / params.temperature) for v in able}
    total, before, kept = sum(weight.values()), 0.0, []
    for v in able:
        if before < params.top_p * total and weight[v] >= params.min_p:
            kept.append(v)
        before += weight[v]
    for v in kept:
        p[v] = weight[v] / sum(weight[u] for u in kept)
    return p


def p_value(counts: np.ndarray, exact: np.ndarray) -> float:
    """Chi-square; cells that expect fewer than 8 draws are pooled, and a draw in an impossible cell settles it."""
    if counts[exact == 0.0].any():
        return 0.0
    expected = exact.ravel() * counts.sum()
    large = expected >= 8.0
    seen = np.append(counts.ravel()[large], counts.ravel()[~large].sum())
    hoped = np.append(expected[large], expected[~large].sum())
    seen, hoped = (seen, hoped) if hoped[-1] >= 8.0 else (seen[:-1], hoped[:-1])
    return float(stats.chi2.sf(((seen - hoped) ** 2 / hoped).sum(), len(hoped) - 1)) if len(hoped) > 1 else 1.0


@dataclass(slots=True)
class Draw:
    """One request of its own: committed output, and pending nodes."""

    setting: Setting
    rejection: bool
    seed: int
    output: list[int] = field(default_factory=list)
    pending: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Machine:
    """DESIGN section 3, "As one step". ``position`` and ``judge`` are where a test breaks it.

    Args:
        window: (round, index of the draw) -> how many tokens the draft makes; 0: the draft is dead this round.
        drops: (round, index) -> whether the pending tokens are dropped first (preemption, death).
    """

    mode: str
    window: Callable[[int, int], int] = lambda number, i: 1 + (number + i) % 4
    drops: Callable[[int, int], bool] = lambda number, i: False
    judge: Judge = lambda logits, segments: verify(logits, segments, num_valid=VOCAB)
    position: Callable[[int], int] = lambda position: position

    def run(self, draws: Sequence[Draw]) -> None:
        """Until each draw has NUM_TOKENS committed tokens."""
        gc.disable()  # it would walk a million live rows again and again
        try:
            self._run(draws)
        finally:
            gc.enable()

    def _run(self, draws: Sequence[Draw]) -> None:
        active, number = list(enumerate(draws)), 0
        while active:
            for i, d in active:
                if self.drops(number, i):
                    d.pending = []
            self._round([d for _, d in active], [self._num_new(number, i, d) for i, d in active])
            active = [(i, d) for i, d in active if len(d.output) < NUM_TOKENS]
            number += 1

    def _num_new(self, number: int, index: int, draw: Draw) -> int:
        """The window, but for what lies so far ahead that it can't reach the tokens that are counted."""
        ahead = NUM_TOKENS + 1 - len(draw.output) - len(draw.pending)
        return 0 if self.mode == "ar" else min(self.window(number, index), max(ahead, 1))

    def _round(self, draws: Sequence[Draw], num_new: Sequence[int]) -> None:
        drafted = self._draft(draws, num_new)
        segments, prefixes = [], []
        for d, new in zip(draws, drafted, strict=True):
            tested = d.pending + (new[:1] if self.mode == "pearl" else new)
            num_rows = len(tested) + (self.mode != "pearl" or not new)
            path = tuple(d.output) + tuple([t for t, _, _ in tested])
            outputs = [path[: len(d.output) + i] for i in range(num_rows)]
            prefixes += [PROMPT + output for output in outputs]
            ids, probs = _stacked(tested, 1), _stacked(tested, 2)
            rows = tuple([self._row(d, output, grammar=True) for output in outputs])
            segments.append(Segment(rows, tuple(t for t, _, _ in tested), d.rejection, ids, probs))
        verdicts = self.judge(TARGET.logits(prefixes), segments)
        for d, new, segment, verdict in zip(draws, drafted, segments, verdicts, strict=True):
            d.output += segment.tested[: verdict.num_accepted]
            d.pending = new[1:] if verdict.num_accepted == len(segment.rows) else []
            if verdict.token >= 0:
                d.output.append(verdict.token)

    def _draft(self, draws: Sequence[Draw], num_new: Sequence[int]) -> list[list[Node]]:
        drafted: list[list[Node]] = [[] for _ in draws]
        paths = [tuple(d.output) + tuple([t for t, _, _ in d.pending]) for d in draws]
        for step in range(max(num_new)):
            for rejection in (False, True):
                which = [i for i, d in enumerate(draws) if num_new[i] > step and d.rejection == rejection]
                if not which:
                    continue
                rows = [self._row(draws[i], paths[i], grammar=False) for i in which]
                logits = DRAFT.logits([PROMPT + paths[i] for i in which])
                if rejection:
                    made = list(zip(*propose(logits, rows, num_valid=VOCAB), strict=True))
                else:
                    made = [(t, None, None) for t in coupled_tokens(logits, rows, draft=True, num_valid=VOCAB)]
                for i, new in zip(which, made, strict=True):
                    drafted[i].append(new)
                    paths[i] += (new[0],)
        return drafted

    def _row(self, draw: Draw, output: tuple[int, ...], *, grammar: bool) -> Row:
        """The draft doesn't know the grammar: its invalid proposals are tested with p = 0."""
        setting = draw.setting
        allowed = setting.grammar[output[-1] if output else PROMPT[-1]] if grammar and setting.grammar else None
        masked = setting.stop if len(output) < setting.params.min_tokens else ()
        position = self.position(len(PROMPT) + len(output))
        return Row(setting.params, draw.seed, 0, position, PROMPT, output, masked, allowed)


def _stacked(tested: list[Node], column: int) -> np.ndarray | None:
    arrays = [a for a in [node[column] for node in tested] if isinstance(a, np.ndarray)]
    if not arrays:
        return None
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def draws_of(settings: Sequence[Setting], rules: Sequence[bool], count: int, engine_seed: int = 0) -> list[Draw]:
    """``count`` requests of each setting under each rule, in turn in one batch, every one with its own seed."""
    kinds = [(s, r) for s in settings for r in rules]
    return [Draw(*kinds[i % len(kinds)], request_seed(engine_seed, i)) for i in range(count * len(kinds))]


def counts_of(draws: Sequence[Draw], setting: Setting, rejection: bool) -> np.ndarray:
    """How often each triple came."""
    counts = np.zeros((VOCAB,) * NUM_TOKENS, int)
    mine = [d.output[:NUM_TOKENS] for d in draws if d.setting is setting and d.rejection == rejection]
    np.add.at(counts, tuple(np.array(mine).T), 1)
    return counts
