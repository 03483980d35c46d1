"""Grammars leave the distribution of constrained AR, by chi-square; broken twins of their masks that it catches."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.core.sampling import Row
from pearl_ray.core.verify import Segment, Verdict, verify
from pearl_ray.model.grammar import GrammarCompiler, GrammarState
from pearl_ray.model.tokenizer import Tokenizer
from tests.distribution import NUM_TOKENS, VOCAB, Draw, Machine, Setting, counts_of, draws_of, p_value
from tests.distribution import _next_token as exact_next_token
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.timeout(1200)  # the first draws for all others

Wanted = StructuredOutputsParams
FALSE_ALARM, BROKEN, DRAWS = 1e-9, 1e-30, 20_000
FILTERS = {"top_k": 4, "top_p": 0.95, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "logit_bias": {4: 1.0}}


@dataclass(frozen=True, eq=False)
class Kind:
    """A grammar, and the five pieces (the table model's ids 1 to 5; 0 ends the text) that spell its answers."""

    wanted: Wanted
    pieces: tuple[str, ...]
    is_answer: Callable[[str], bool]
    options: dict[str, object] = field(default_factory=dict)

    @functools.cached_property
    def setting(self) -> Setting:
        return Setting(str(self.wanted), SamplingParams(structured_outputs=self.wanted, **self.options))

    @functools.cached_property
    def language(self) -> list[str]:
        """Every answer that three tokens can be the beginning of: what they leave open ends in five characters."""
        letters = sorted({c for piece in self.pieces for c in piece})
        texts = ("".join(s) for n in range(9) for s in itertools.product(letters, repeat=n))
        return [text for text in texts if self.is_answer(text)]

    @functools.cached_property
    def compiler(self) -> GrammarCompiler:
        return GrammarCompiler(Tokenizer(tiny_tokenizer(self.pieces)), VOCAB + 1)


def _is_object(text: str) -> bool:
    return text[:1] == "{" and text[-1:] == "}" and isinstance(_parsed(text), dict)


def _is_short_array(text: str) -> bool:
    value = _parsed(text) if text[:1] == "[" else None
    return isinstance(value, list) and len(value) <= 2 and all(v in (1, 12, 121) for v in value)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


CHOICES = ("a", "ab", "abc", "bca", "cabb", "cc")
SCHEMA = {"type": "array", "items": {"enum": [1, 12, 121]}, "maxItems": 2}
LETTERS = ("a", "b", "c", "ab", "bc")
KINDS = {
    "choice": Kind(Wanted(choice=CHOICES), LETTERS, CHOICES.__contains__),
    "regex": Kind(Wanted(regex="(a|bc)+c?|b"), LETTERS, lambda t: re.fullmatch("(a|bc)+c?|b", t) is not None, FILTERS),
    "json": Kind(Wanted(json=SCHEMA), ("[", "]", ",", "1", "2"), _is_short_array, {"temperature": 1.4}),
    "json_object": Kind(Wanted(json_object=True), ("{", "}", '"', ":", "1"), _is_object),
}
KIND_OF = {kind.wanted: kind for kind in KINDS.values()}
Masks = list[torch.Tensor | None]


def exact_distribution(kind: Kind) -> np.ndarray:
    """Constrained AR, enumerated: each token's softmax over what some answer of the language goes on with."""
    exact, rows = np.zeros((VOCAB,) * NUM_TOKENS), {}
    for tokens in itertools.product(range(VOCAB), repeat=NUM_TOKENS):
        exact[tokens] = 1.0
        for i, token in enumerate(tokens):
            if exact[tokens] > 0.0 and tokens[:i] not in rows:
                able = torch.tensor([_may_follow(kind, tokens[:i], v) for v in range(VOCAB)])
                rows[tokens[:i]] = exact_next_token(replace(kind.setting, grammar=(able,) * VOCAB), list(tokens[:i]))
            exact[tokens] *= rows[tokens[:i]][token] if exact[tokens] > 0.0 else 0.0
    return exact


def _may_follow(kind: Kind, tokens: Sequence[int], token: int) -> bool:
    if 0 in tokens:
        return token == 0
    said = "".join(kind.pieces[t - 1] for t in tokens)
    if token == 0:
        return said in kind.language
    return any(text.startswith(said + kind.pieces[token - 1]) for text in kind.language)


def _spelled(tokens: Sequence[int]) -> list[int]:
    """The table model's tokens as the tokenizer's, which has a start token at 1."""
    return [t + (t > 0) for t in tokens]


def _of_table(masks: Masks) -> Masks:
    return [None if mask_V is None else torch.cat([mask_V[:1], mask_V[2:]]) for mask_V in masks]


@functools.cache
def masks_of(wanted: Wanted, output: tuple[int, ...], window: tuple[int, ...]) -> Masks:
    """Those of a fresh state behind ``output``."""
    state = KIND_OF[wanted].compiler.state(wanted)
    state.accept(_spelled(output))
    return _of_table(state.masks_along(_spelled(window)))


def remembered(seed: int, wanted: Wanted, output: tuple[int, ...], window: tuple[int, ...]) -> Masks:
    """What many requests share, so that there can be many."""
    return masks_of(wanted, output, window)


@dataclass(slots=True)
class KeptStates:
    """The masks of one state per request that goes from round to round; ``along`` is where a test breaks it."""

    along: Callable[[GrammarState, list[int]], Masks]
    states: dict[int, GrammarState] = field(default_factory=dict)

    def __call__(self, seed: int, wanted: Wanted, output: tuple[int, ...], window: tuple[int, ...]) -> Masks:
        if seed not in self.states:
            self.states[seed] = KIND_OF[wanted].compiler.state(wanted)
        self.states[seed].accept(_spelled(output[self.states[seed].num_accepted :]))
        return _of_table(self.along(self.states[seed], _spelled(window)))


@dataclass(slots=True)
class GrammarMachine(Machine):
    """The machine with grammars on the target's rows, and on the draft's if ``masks_draft``."""

    masks: Callable[[int, Wanted, tuple[int, ...], tuple[int, ...]], Masks] = remembered
    masks_draft: bool = False

    def __post_init__(self) -> None:
        self.judge = self._judge

    def _judge(self, logits: torch.Tensor, segments: Sequence[Segment]) -> list[Verdict]:
        masks: Masks = []
        for segment in segments:
            first, followed = segment.rows[0], segment.tested[: len(segment.rows) - 1]
            masks += self.masks(first.seed, first.params.structured_outputs, tuple(first.output), followed)
        allowed_RV = torch.stack([ALL if mask_V is None else mask_V for mask_V in masks])
        return verify(logits[:, :VOCAB].masked_fill(~allowed_RV, -torch.inf), segments)

    def _row(self, draw: Draw, output: tuple[int, ...], *, grammar: bool) -> Row:
        row = Machine._row(self, draw, output, grammar=False)
        if grammar or not self.masks_draft:
            return row
        committed = tuple(draw.output)
        masks = masks_of(draw.setting.params.structured_outputs, committed, output[len(committed) :])
        return replace(row, allowed=masks[-1])


ALL = torch.ones(VOCAB, dtype=torch.bool)


@functools.cache
def outputs() -> list[Draw]:
    draws = draws_of([KINDS[k].setting for k in ("regex", "json")], (False, True), DRAWS, engine_seed=3)
    draws += draws_of([KINDS[k].setting for k in ("choice", "json_object")], (False, True), DRAWS // 4, engine_seed=4)
    GrammarMachine("pearl", lambda number, i: 1 + (number + i) % 3).run(draws)
    return draws


@pytest.mark.parametrize("rejection", [False, True], ids=["coupled", "rejection"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_three_tokens_follow_the_distribution_of_constrained_ar(kind: str, rejection: bool) -> None:
    counts = counts_of(outputs(), KINDS[kind].setting, rejection)
    assert counts.sum() >= DRAWS // 4
    assert p_value(counts, exact_distribution(KINDS[kind])) > FALSE_ALARM


@pytest.mark.parametrize("kind", KINDS)
def test_coupled_text_is_the_same_in_every_mode_whether_the_draft_knows_the_grammar_or_not(kind: str) -> None:
    texts = []
    for mode, masks_draft in (("ar", False), ("sd", True), ("sd", False), ("pearl", True), ("pearl", False)):
        draws = draws_of([KINDS[kind].setting], (False,), 200, engine_seed=5)
        GrammarMachine(mode, masks=KeptStates(GrammarState.masks_along), masks_draft=masks_draft).run(draws)
        texts.append([d.output[:NUM_TOKENS] for d in draws])
    assert all(text == texts[0] for text in texts)


def _not_rolled_back(state: GrammarState, window: list[int]) -> Masks:
    masks = state.masks_along(window)
    state._matcher.try_consume_tokens(window)
    return masks


def _of_the_row_before(state: GrammarState, window: list[int]) -> Masks:
    masks = state.masks_along(window)
    return [masks[0], *masks[:-1]]


def _none_behind_the_first(state: GrammarState, window: list[int]) -> Masks:
    return [*state.masks_along([]), *[None] * len(window)]


@pytest.mark.parametrize("rejection", [False, True], ids=["coupled", "rejection"])
@pytest.mark.parametrize(
    ("along", "is_broken"),
    [
        (GrammarState.masks_along, False),
        (_not_rolled_back, True),
        (_of_the_row_before, True),
        (_none_behind_the_first, True),
    ],
    ids=["whole", "not rolled back", "of the row before", "none behind the first"],
)
def test_the_comparison_sees_masks_that_are_not_rolled_back_or_of_another_row(
    along: Callable[[GrammarState, list[int]], Masks], is_broken: bool, rejection: bool
) -> None:
    kind = KINDS["regex"]
    draws = draws_of([kind.setting], (rejection,), 1_000, engine_seed=7)
    GrammarMachine("pearl", masks=KeptStates(along)).run(draws)
    found = p_value(counts_of(draws, kind.setting, rejection), exact_distribution(kind))
    assert found < BROKEN if is_broken else found > FALSE_ALARM
