"""Every field of a request, alone and mixed: with `coupled` PEARL = SD = AR at every window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pearl_ray.core import replica
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.core.requests import Request
from tests.local_engine import LocalEngine
from tests.tiny import JSON_PIECES, tiny_pair

pytestmark = pytest.mark.timeout(1200)  # minutes on a loaded machine

ARRANGEMENTS = [("ar", 1), ("pearl", 1), ("pearl", 4), ("pearl", 8), ("sd", 1), ("sd", 4), ("sd", 8)]
NUM_IDS = len(JSON_PIECES) + 2
PROMPTS = ['Q1: {"a":', "Once upon a time ", "x", "12, 12, ab, ab, true and false; "]
Engines = dict[tuple[str, int], LocalEngine]

ids = st.integers(0, NUM_IDS - 1)
penalties = st.floats(-2.0, 2.0, allow_nan=False)
WANTED = [
    StructuredOutputsParams(regex="[a-c]{2,5}(12|true)?"),
    StructuredOutputsParams(regex=".{0,12}"),
    StructuredOutputsParams(grammar='start: WORD ("," WORD)* \nWORD: /[a-d]{1,3}/'),
    StructuredOutputsParams(choice=["ab12", "a", "true story", "é"]),
    StructuredOutputsParams(json_object=True),
    StructuredOutputsParams(json={"type": "array", "items": {"enum": [1, 12, "ab", None]}, "maxItems": 3}),
]

# What each field may be; a field that isn't here fails the test that counts them.
VALUES: dict[str, st.SearchStrategy[object]] = {
    "n": st.integers(2, 3),
    "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7, 20.0]),
    "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
    "top_k": st.sampled_from([1, 2, 7, 40, 1000, -1]),
    "min_p": st.sampled_from([0.01, 0.2, 1.0]),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "max_tokens": st.integers(1, 24),
    "min_tokens": st.integers(1, 24),
    "stop": st.lists(st.sampled_from(["e", "ab", '"', " ", "12", "ue", "}}", "é"]), min_size=1, max_size=3),
    "stop_token_ids": st.lists(ids, min_size=1, max_size=8),
    "ignore_eos": st.just(True),
    "presence_penalty": penalties,
    "frequency_penalty": penalties,
    "repetition_penalty": st.sampled_from([0.5, 0.9, 1.2, 2.0]),
    "logit_bias": st.dictionaries(ids, st.floats(-100.0, 100.0, allow_nan=False), min_size=1, max_size=5),
    "logprobs": st.integers(0, 5),
    "prompt_logprobs": st.integers(0, 5),
    "draft_temperature": st.sampled_from([0.0, 0.5, 3.0]),
    "verification": st.just("coupled"),
    "num_speculative_tokens": st.sampled_from([0, 1, 3, 9]),
    "structured_outputs": st.sampled_from(WANTED),
}


def test_every_field_of_a_request_has_values_to_be_tried_with() -> None:
    assert set(VALUES) == {field.name for field in dataclasses.fields(SamplingParams)}


def finished(options: dict[str, object]) -> SamplingParams:
    """With what makes the answer one: a seed; and short."""
    most = options.setdefault("max_tokens", 16)
    if "min_tokens" in options:
        options["min_tokens"] = min(options["min_tokens"], most)  # type: ignore[type-var]
    return SamplingParams(**({"seed": 7} | options))  # type: ignore[arg-type]


@st.composite
def params(draw: st.DrawFn, always: str | None = None) -> SamplingParams:
    """A random subset of the fields, ``always`` among them."""
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=8, unique=True))
    return finished({name: draw(VALUES[name]) for name in dict.fromkeys([*names, *([always] if always else [])])})


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """One per arrangement, for all that is asked here; ids from 116 on are padding."""
    dirs: tuple[Path, Path] = tiny_pair(tmp_path_factory.mktemp("fields"), vocab_size=128, pieces=JSON_PIECES)
    with ExitStack() as stack:
        yield {
            (mode, window): stack.enter_context(LocalEngine(dirs, mode=mode, window=window, max_num_seqs=64))
            for mode, window in ARRANGEMENTS
        }


def seen(request: Request) -> tuple[list[object], list[object]]:
    """All that a user gets that the speculation must not change; and apart, the log-probabilities."""
    output = request.output()
    answers: list[object] = [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in output.outputs]
    return answers, [*(o.logprobs for o in output.outputs), output.prompt_logprobs]


def close_to(logprob: float) -> object:
    """Sums in another order differ in their last bits: rounded, some would differ in the last digit."""
    return pytest.approx(logprob, rel=0, abs=1e-9)


def readable(logprobs: list | None, number: Callable[[float], object]) -> list[object] | None:
    if logprobs is None:
        return None
    return [c and {i: (number(p.logprob), p.rank, p.decoded_token) for i, p in c.items()} for c in logprobs]


def check(engines: Engines, wanted: list[SamplingParams]) -> None:
    """Together in a batch, on every engine, after whatever was there before."""
    answers = {}
    for arrangement, engine in engines.items():
        prompts = [engine.models.tokenizer.encode(PROMPTS[i % len(PROMPTS)]) for i in range(len(wanted))]
        answers[arrangement] = [seen(request) for request in engine.generate(prompts, wanted)]
        assert all(pool.num_free == pool.num_blocks for pool in engine.pools)
    for arrangement, found in answers.items():
        for one, (right, rated), (theirs, rates) in zip(wanted, answers["ar", 1], found, strict=True):
            assert theirs == right, f"{arrangement} differs from AR: {one}"
            told, wanted_rates = [readable(r, float) for r in rates], [readable(r, close_to) for r in rated]
            assert told == wanted_rates, f"{arrangement} differs from AR: {one}"


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.fixed_dictionaries({name: st.lists(of, min_size=2, max_size=2) for name, of in VALUES.items()}))
def test_each_field_alone_gives_the_same_answer_in_every_mode_and_window(
    engines: Engines, values: dict[str, list[object]]
) -> None:
    check(engines, [finished({name: value}) for name, two in values.items() for value in two])


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(wanted=st.lists(params(), min_size=16, max_size=24))
def test_any_mixture_of_fields_gives_the_same_answer_in_every_mode_and_window(
    engines: Engines, wanted: list[SamplingParams]
) -> None:
    check(engines, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_a_field_with_any_others_gives_the_same_answer_in_every_mode_and_window(engines: Engines, name: str) -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(wanted=st.lists(params(always=name), min_size=8, max_size=16))
    def try_mixtures(wanted: list[SamplingParams]) -> None:
        check(engines, wanted)

    try_mixtures()


def test_the_comparison_sees_a_penalty_that_the_window_forgets(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin: rows behind a window's first count the committed tokens only."""
    row = replica.BatchSequence.row

    def forgetful(self: replica.BatchSequence, position: int, drafted: tuple[int, ...] = ()) -> object:
        whole = row(self, position, drafted)
        return dataclasses.replace(whole, output=list(whole.output)[: len(whole.output) - len(drafted)])

    wanted = [finished({"frequency_penalty": 2.0, "temperature": 1.0, "seed": i, "max_tokens": 24}) for i in range(4)]
    check(engines, wanted)
    monkeypatch.setattr(replica.BatchSequence, "row", forgetful)
    with pytest.raises(AssertionError, match="differs from AR"):
        check(engines, wanted)
