"""The requests of the soak: every kind of wish, each with one right answer. Knows neither HTTP nor engines.

``fields`` are named alike in ``POST /v1/completions`` and in ``SamplingParams``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PROMPTS = (
    "Once upon a time",
    "Tell me of the rain in spain",
    "hello",
    "There was a king who had 3 daughters, and each of them",
    "Why is it so dark here?",
    "a b c d e f g",
)
SEEDS = (1, 2, 3)
LONG_TOKENS = 400  # of an answer that is to be hung up on
LONG_PROMPT_TOKENS = 600  # more than one pass takes
PLAIN = ("greedy", "seeded")
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bc", "def"]},
        "is": {"type": "boolean"},
    },
    "required": ["n", "kind", "is"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One request.

    Attributes:
        prompt: a text or token ids.
        is_repeatable: whether its text is the same every time; else only that it ends whole is asked.
    """

    kind: str
    prompt: str | Sequence[int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_repeatable: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether rounds of such requests alone can be queued ahead on a GPU."""
        return self.kind in PLAIN


def make_cases(long_prompts: Sequence[Sequence[int]], *, structured: bool, fixed_window: bool) -> list[Case]:
    """Every kind.

    Args:
        long_prompts: token ids, for prefill in chunks.
        structured: whether grammars can be followed here.
        fixed_window: whether every round of a sequence drafts: a text under `rejection` is its seed's only then.
    """
    found: list[Case] = []
    for number, prompt in enumerate(PROMPTS):
        tokens = 16 + 12 * number
        found.append(Case(kind="greedy", prompt=prompt, fields={"max_tokens": tokens, "temperature": 0.0}))
        for seed in SEEDS:
            wish = {"max_tokens": tokens, "temperature": 0.8 + 0.1 * seed, "seed": seed}
            found.append(Case(kind="seeded", prompt=prompt, fields=wish))
    for number, prompt_ids in enumerate(long_prompts):
        found.append(Case(kind="long prompt", prompt=prompt_ids, fields={"max_tokens": 24, "temperature": 0.0}))
        found.append(Case(kind="long prompt", prompt=prompt_ids, fields={"max_tokens": 40, "seed": number}))
    for number, (kind, wish) in enumerate(_wishes(structured)):
        base = {"max_tokens": 32 + 8 * (number % 4), "temperature": 0.9, "seed": 100 + number}
        is_repeatable = kind != "rejection" or fixed_window
        prompt = PROMPTS[number % len(PROMPTS)]
        found.append(Case(kind=kind, prompt=prompt, fields=base | wish, is_repeatable=is_repeatable))
    return found


def _wishes(structured: bool) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = [
        ("filters", {"top_k": 5}),
        ("filters", {"top_p": 0.7}),
        ("filters", {"min_p": 0.05}),
        ("filters", {"top_k": 20, "top_p": 0.9, "min_p": 0.02}),
        ("rejection", {"verification": "rejection"}),
        ("rejection", {"verification": "rejection", "top_p": 0.9}),
        ("rejection", {"verification": "rejection", "temperature": 0.5, "draft_temperature": 0.9}),
        ("penalties", {"presence_penalty": 0.8, "frequency_penalty": 0.4}),
        ("penalties", {"repetition_penalty": 1.3, "temperature": 0.0}),
        ("bias", {"logit_bias": {"20": 4.0, "30": -100.0, "40": 2.5}}),
        ("bias", {"logit_bias": {"25": 3.0}, "temperature": 0.0, "ignore_eos": True}),
        ("stop", {"stop": ["e", "t ", "0"], "max_tokens": 100}),
        ("stop", {"stop": ["xyz", "a"], "min_tokens": 8, "max_tokens": 100}),
        ("stop", {"stop_token_ids": [11, 22, 33, 44], "max_tokens": 100}),
        ("logprobs", {"logprobs": 5}),
        ("logprobs", {"logprobs": 0, "temperature": 0.0}),
        ("two answers", {"n": 2}),
        ("two answers", {"n": 2, "top_k": 10, "logprobs": 1}),
        ("two answers", {"n": 2, "num_speculative_tokens": 0, "ignore_eos": True}),  # that end in the same round
        ("window", {"num_speculative_tokens": 0}),
        ("window", {"num_speculative_tokens": 7}),
    ]
    if structured:
        found += [
            ("structured", {"structured_outputs": {"regex": "[a-f]{2,9}-[0-9]{1,8}"}}),
            ("structured", {"structured_outputs": {"choice": ["yes", "no", "a much longer one"]}}),
            ("structured", {"structured_outputs": {"json": SCHEMA}, "max_tokens": 64}),
        ]
    return found
