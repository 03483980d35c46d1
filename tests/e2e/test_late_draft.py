"""A draft that comes late, and rounds shared with any neighbours, change no text: only how many rounds it takes.

The draft is made late by emptying its prefix cache while the target keeps its own: it then feeds a prompt in chunks
that the target needn't feed at all. Each text is held against that of its request alone, in bfloat16 too.
"""

from __future__ import annotations

import pytest

from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from tests.local_engine import LocalEngine

CHUNK = 16  # tokens of a pass
LONG = 100
FIXED = {"dtype": "bfloat16", "deterministic": True}
KINDS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.25},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.0, "logit_bias": {7: 3.0}, "min_tokens": 8},
    {"temperature": 1.0, "stop": ("e", "t ")},
    {"temperature": 1.0, "verification": "rejection"},
    {"temperature": 0.5, "verification": "rejection", "top_p": 0.75, "draft_temperature": 1.0},
    {"temperature": 1.0, "verification": "rejection", "logprobs": 0, "presence_penalty": 0.5},
    {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="[ab]{5,9}")},
    {"temperature": 1.0, "n": 2},
]


def params_of(number: int) -> SamplingParams:
    return SamplingParams(seed=number, max_tokens=16, **KINDS[number])  # type: ignore[arg-type]


def prompt_of(number: int, length: int) -> list[int]:
    return [2 + (number * 7 + i * (i + 3)) % 60 for i in range(length)]


def forget(engine: LocalEngine, role: int) -> None:
    """Empty one model's prefix cache: whoever takes a block forgets what it held."""
    pool = engine.pools[role]
    pool.release(pool.allocate(pool.num_free))


def words(engine: LocalEngine, prompts, params) -> list[list[tuple[list[int], str]]]:
    requests = engine.generate(prompts, params)
    return [[(answer.token_ids, answer.detokenizer.text) for answer in request.answers] for request in requests]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("numbers", [{"dtype": "float32"}, FIXED])
def test_a_draft_that_has_to_catch_up_changes_no_text(tiny_dirs, on_device, rule, numbers):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True, verification=rule)
    prompt = prompt_of(1, LONG)
    with LocalEngine(tiny_dirs, max_num_batched_tokens=CHUNK, on_device=on_device, **numbers) as engine:
        [first] = engine.generate([prompt], [params])
        forget(engine, role=1)
        [late] = engine.generate([prompt], [params])
        forget(engine, role=0)
        [early] = engine.generate([prompt], [params])
    assert late.answers[0].token_ids == early.answers[0].token_ids == first.answers[0].token_ids
    alone = late.answers[0].origins.count("target")
    assert alone == 0 if rule == "rejection" else alone > 3, "one waits for its draft, the other goes on without it"
    assert early.answers[0].origins.count("target") == 0


@pytest.mark.parametrize("numbers", [{"dtype": "float64"}, FIXED])
def test_whoever_shares_its_rounds_and_however_late_its_draft_a_request_has_its_text(tiny_dirs, numbers):
    """Plain rows share rounds with rows that need the host, and don't; long prompts come between, drafts late."""
    count = len(KINDS)
    prompts = [prompt_of(i % 5, LONG if i % 4 == 1 else 9 + i) for i in range(count)]
    params = [params_of(i) for i in range(count)]
    options = {"max_num_batched_tokens": 2 * CHUNK, "num_blocks": 64, "max_num_seqs": 6, "on_device": True}
    with LocalEngine(tiny_dirs, **options, **numbers) as engine:
        alone = [words(engine, [prompt], [one])[0] for prompt, one in zip(prompts, params, strict=True)]
        forget(engine, role=1)
        assert words(engine, prompts, params) == alone
        assert words(engine, prompts[::-1], params[::-1]) == alone[::-1]


def test_no_seat_for_the_second_answer_changes_neither_text(tiny_dirs):
    params = [SamplingParams(temperature=1.0, seed=i, n=2, max_tokens=20, ignore_eos=True) for i in range(3)]
    prompts = [prompt_of(i, 12) for i in range(3)]
    with LocalEngine(tiny_dirs, on_device=True) as engine:
        expected = words(engine, prompts, params)
    with LocalEngine(tiny_dirs, on_device=True, max_num_seqs=3) as engine:
        assert words(engine, prompts, params) == expected
