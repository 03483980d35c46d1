"""Every field of every thing a user fills in refuses every bad value: one line with field, value and what is allowed.

The fields are taken from the classes themselves, so that a new one without bad values here fails.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import ConfigError, PearlError
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.serving import schema
from pearl_ray.serving.errors import ApiError, as_api_error, invalid_body
from pearl_ray.serving.structured import of_structured_outputs
from pearl_ray.serving.unsupported import NOT_HONOURED, refuse_unsupported

LONGEST_MESSAGE = 600
HUGE = [10**30, 10**400, -(10**400), 10**5000]

# -- bad values by what a field takes; none of them is None, which every field of a body takes -----------------------

anything_else = st.one_of(st.binary(min_size=1, max_size=3), st.complex_numbers(max_magnitude=9), st.just(object))
containers = st.one_of(
    st.just([]), st.just({}), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=2), st.integers())
)
texts = st.one_of(st.text(max_size=20), st.just("1"), st.just("x" * 5000), st.just("two\nlines"))
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
fractions = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != int(x))


def no_whole(low: int, high: int | None) -> st.SearchStrategy[object]:
    """What isn't a whole number of this range."""
    outside = [st.integers(max_value=low - 1)]
    if high is not None:
        outside += [st.integers(min_value=high + 1), st.sampled_from([x for x in HUGE if x > high])]
    return st.one_of(*outside, texts, st.booleans(), fractions, NOT_FINITE, containers)


def no_number(low: float, high: float, *, open_low: bool = False) -> st.SearchStrategy[object]:
    outside = [st.floats(max_value=low, exclude_max=not open_low, allow_nan=False)]
    outside += [st.floats(min_value=high, exclude_min=True, allow_nan=False), st.sampled_from(HUGE)]
    return st.one_of(*outside, texts, st.booleans(), NOT_FINITE, containers)  # type: ignore[arg-type]


def no_choice(*allowed: str) -> st.SearchStrategy[object]:
    return st.one_of(texts.filter(lambda x: x not in allowed), st.integers(), st.booleans(), NOT_FINITE, containers)


no_flag = st.one_of(texts, st.integers(), fractions, NOT_FINITE, containers)
no_text = st.one_of(st.integers(), st.booleans(), fractions, NOT_FINITE, containers)
lone_surrogate = st.just("a\ud800")
no_stop = st.one_of(
    st.just(""), lone_surrogate, st.just({"a": 1}), no_text.filter(lambda x: x not in ([], {}) or x == {}),
    st.lists(st.one_of(st.just(""), st.integers(), lone_surrogate), min_size=1, max_size=3),
)  # fmt: skip
no_ids = st.one_of(
    texts, st.integers(), st.booleans(), fractions, NOT_FINITE, st.just({}), st.just({1: 2}),
    st.lists(no_whole(0, 2**31 - 1), min_size=1, max_size=3),
)  # fmt: skip
no_bias = st.one_of(
    texts, st.integers(), fractions, NOT_FINITE, st.just([]), st.just([1]),
    st.dictionaries(st.sampled_from([-1, 1.5, "x", "-3", "", 2**31, "9" * 5000]), st.just(1.0), min_size=1),
    st.dictionaries(st.just(3), no_number(-100.0, 100.0), min_size=1),
)  # fmt: skip

# -- the frozen dataclasses -----------------------------------------------------------------------------------------

Table = dict[str, st.SearchStrategy[object]]
MAX_INT = 2**31 - 1
SAMPLING: Table = {
    "n": no_whole(1, 64),
    "temperature": no_number(0, 100),
    "top_p": no_number(0, 1, open_low=True),
    "top_k": no_whole(-1, MAX_INT),
    "min_p": no_number(0, 1),
    "seed": no_whole(-(2**63), 2**64 - 1),
    "max_tokens": no_whole(1, MAX_INT),
    "min_tokens": no_whole(0, 16),  # max_tokens is 16
    "stop": no_stop,
    "stop_token_ids": no_ids,
    "ignore_eos": no_flag,
    "presence_penalty": no_number(-2, 2),
    "frequency_penalty": no_number(-2, 2),
    "repetition_penalty": no_number(0, 100, open_low=True),
    "logit_bias": no_bias,
    "logprobs": no_whole(0, 20),
    "prompt_logprobs": no_whole(0, 20),
    "draft_temperature": no_number(0, 100),
    "verification": no_choice("coupled", "rejection"),
    "num_speculative_tokens": no_whole(0, 64),
    "structured_outputs": st.one_of(no_text, texts),
}
STRUCTURED: Table = {
    "json": st.one_of(
        st.sampled_from(["{", "[]", "3", "", '{"a": NaN', "{" * 5000, '{"a": "\ud800"}']),
        st.sampled_from([7, [], [{}], True, {"a": math.nan}, {"a": object}, {"x": {1, 2}}]),
    ),
    "json_object": st.one_of(texts, st.integers(), NOT_FINITE, containers),
    "regex": st.one_of(st.just(""), no_text, lone_surrogate),
    "grammar": st.one_of(st.just(""), no_text, lone_surrogate),
    "choice": st.one_of(
        st.sampled_from([[], "abc", 5, {}, [""], ["a", 3], ["a\ud800"], [None], True]), fractions, NOT_FINITE
    ),
}
path = st.one_of(st.sampled_from(["", "  ", "\n"]), no_text)
POSITIVE = no_whole(1, None)
not_above_zero = st.one_of(
    st.floats(max_value=0.0, allow_nan=False), texts, st.booleans(), NOT_FINITE, containers, st.just(10**400)
)
CONFIG: Table = {
    "target_model": path,
    "draft_model": path,
    "target_tensor_parallel_size": no_whole(1, 1024),
    "draft_tensor_parallel_size": no_whole(1, 1024),
    "mode": no_choice("pearl", "sd", "ar"),
    "verification": no_choice("coupled", "rejection"),
    "num_speculative_tokens": no_whole(1, 64).filter(lambda x: x != "auto"),
    "dtype": no_choice("auto", "bfloat16", "float16", "float32", "float64"),
    "device": no_choice("auto", "cuda", "cpu"),
    "max_model_len": no_whole(2, None),
    "max_num_seqs": POSITIVE,
    "max_num_batched_tokens": no_whole(256, None),  # max_num_seqs is 256
    "min_decode_share": st.one_of(no_number(0, 1), st.just(1.0), st.just(1)),
    "gpu_memory_utilization": no_number(0, 1, open_low=True),
    "block_size": no_whole(1, 256),
    "kv_cache_blocks": POSITIVE,
    "enable_prefix_caching": no_flag,
    "seed": no_whole(-(2**63), 2**64 - 1),
    "attention_backend": no_choice("auto", "flash-attn", "triton", "torch"),
    "enforce_eager": no_flag,
    "max_waiting_requests": POSITIVE,
    "round_timeout_s": not_above_zero,
    "cpus_per_shard": not_above_zero,
    "ray_address": path,
    "trace": path,
    "colocate": no_flag,
    "deterministic": no_flag,
    "bridge": no_choice("auto", "nccl", "gloo", "shm"),
}
CLASSES: dict[type, Table] = {SamplingParams: SAMPLING, StructuredOutputsParams: STRUCTURED, PearlConfig: CONFIG}
# What each names instead where two don't go together: one of four kinds, and a size that another bounds.
INSTEAD = {(StructuredOutputsParams, "json_object"): {"json_object", "structured_outputs"}}


def is_shown(value: object, message: str) -> bool:
    """Whether the message has the value, or the start of it, as Python writes it; or says that it can't be written."""
    try:
        text = repr(value)
    except ValueError:
        return "too long" in message
    return text[:40] in message or repr(text)[1:40] in message or str(value)[:40] in message


def assert_tells(message: str, names: set[str], value: object) -> None:
    """One line, no longer than a screen, that has the name, the value and what would be allowed."""
    assert "\n" not in message and len(message) <= LONGEST_MESSAGE, message[:200]
    assert any(message.startswith(f"{name}=") for name in names), message
    assert is_shown(value, message), (value, message)
    _, _, allowed = message.partition(" is not allowed: ")
    assert len(allowed) > 8, message


@pytest.mark.parametrize("made", CLASSES, ids=lambda c: c.__name__)
def test_every_field_has_bad_values_here(made: type) -> None:
    assert set(CLASSES[made]) == {field.name for field in dataclasses.fields(made)}


CASES = [(made, name) for made, table in CLASSES.items() for name in table]


@pytest.mark.parametrize(("made", "name"), CASES, ids=[f"{made.__name__}-{name}" for made, name in CASES])
def test_a_bad_value_is_refused_in_one_line_with_field_value_and_what_is_allowed(made: type, name: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(value=CLASSES[made][name])
    def refuses(value: object) -> None:
        with pytest.raises(ConfigError) as caught:
            made(**{name: value})
        assert isinstance(caught.value, ValueError)
        assert_tells(str(caught.value), INSTEAD.get((made, name), {name}), value)

    refuses()


NUMERIC = {
    (SamplingParams, "n"): ("1", "64"),
    (SamplingParams, "temperature"): ("0", "100"),
    (SamplingParams, "top_p"): ("0", "1"),
    (SamplingParams, "top_k"): ("0", str(MAX_INT)),
    (SamplingParams, "min_p"): ("0", "1"),
    (SamplingParams, "seed"): (str(-(2**63)), str(2**64 - 1)),
    (SamplingParams, "max_tokens"): ("1", str(MAX_INT)),
    (SamplingParams, "min_tokens"): ("0", "16"),
    (SamplingParams, "stop_token_ids"): ("0", str(MAX_INT)),
    (SamplingParams, "presence_penalty"): ("-2", "2"),
    (SamplingParams, "frequency_penalty"): ("-2", "2"),
    (SamplingParams, "repetition_penalty"): ("0", "100"),
    (SamplingParams, "logit_bias"): ("-100", "100"),
    (SamplingParams, "logprobs"): ("0", "20"),
    (SamplingParams, "prompt_logprobs"): ("0", "20"),
    (SamplingParams, "draft_temperature"): ("0", "100"),
    (SamplingParams, "num_speculative_tokens"): ("0", "64"),
    (PearlConfig, "target_tensor_parallel_size"): ("1", "1024"),
    (PearlConfig, "draft_tensor_parallel_size"): ("1", "1024"),
    (PearlConfig, "num_speculative_tokens"): ("1", "64"),
    (PearlConfig, "min_decode_share"): ("0", "1"),
    (PearlConfig, "gpu_memory_utilization"): ("0", "1"),
    (PearlConfig, "block_size"): ("1", "256"),
    (PearlConfig, "seed"): (str(-(2**63)), str(2**64 - 1)),
}


@pytest.mark.parametrize(("made", "name"), NUMERIC, ids=[f"{made.__name__}-{name}" for made, name in NUMERIC])
def test_the_message_about_a_number_has_both_ends_of_its_range(made: type, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**{name: "no number"})
    _, _, allowed = str(caught.value).partition(" is not allowed: ")
    for end in NUMERIC[made, name]:
        assert re.search(rf"(?<![\d.]){re.escape(end)}(?![\d.])", allowed), allowed


def test_what_is_refused_nowhere_else_is_not_accepted_by_half() -> None:
    """Conversions that would hide a mistake."""
    for options in ({"logit_bias": {1.5: 1.0}}, {"logit_bias": {True: 1.0}}, {"logit_bias": {1: True}}):
        with pytest.raises(ConfigError, match="logit_bias"):
            SamplingParams(**options)  # type: ignore[arg-type]
    assert SamplingParams(logit_bias={"5": 1}).logit_bias == {5: 1.0}  # type: ignore[dict-item]
    assert SamplingParams(stop="ab").stop == ("ab",) and SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None).stop == ()  # type: ignore[arg-type]


# -- bodies of HTTP requests ----------------------------------------------------------------------------------------

of_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
json_numbers = st.one_of(st.integers(-(10**20), 10**20), st.floats(), st.sampled_from([10**30, -(10**30)]))
WRONG_KIND = st.one_of(of_json, json_numbers, st.just("x" * 3000), st.just([1] * 3000), st.just({"a": "\n"}))

BODIES: dict[type[BaseModel], dict[str, Any]] = {
    schema.CompletionRequest: {"prompt": "x"},
    schema.ChatCompletionRequest: {"messages": [{"role": "user", "content": "x"}]},
    schema.TokenizeRequest: {"prompt": "x"},
    schema.DetokenizeRequest: {"tokens": [1]},
    schema.StructuredOutputs: {"regex": "a"},
    schema.StreamOptions: {},
    schema.Message: {"role": "user"},
    schema.TextPart: {"type": "text", "text": "x"},
    schema.ToolCall: {"id": "1", "function": {"name": "f", "arguments": "{}"}},
    schema.FunctionCall: {"name": "f", "arguments": "{}"},
    schema.Tool: {"type": "function", "function": {"name": "f"}},
    schema.FunctionDefinition: {"name": "f"},
    schema.FunctionOf: {"name": "f"},
    schema.NamedToolChoice: {"type": "function", "function": {"name": "f"}},
    schema.ResponseFormat: {"type": "text"},
    schema.JsonSchema: {"name": "s"},
}
# Any JSON object, or any value at all, is taken, and judged elsewhere.
TAKES_OBJECTS = {"chat_template_kwargs", "parameters", "schema", "json"}


def complaint(model: type[BaseModel], body: dict[str, Any]) -> ApiError | None:
    """What the server says of a body, as its routes ask it; None if there is nothing to say."""
    try:
        made = model.model_validate(body)
        if isinstance(made, schema.SamplingFields):
            refuse_unsupported("completion" if isinstance(made, schema.CompletionRequest) else "chat", made)
            made.check()
            given = made.max_tokens if made.max_tokens else 1
            made.sampling(given, None, of_structured_outputs(made.structured_outputs))
    except ValidationError as error:
        return invalid_body([{**one, "loc": ("body", *one["loc"])} for one in error.errors()])
    except (ApiError, PearlError) as error:
        return as_api_error(error)
    return None


# Where the complaint is about a field that isn't there, or about two that don't go together.
NO_VALUE = re.compile("Field required|needs|=None is not allowed: exactly one|only with")


def fields_of(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def test_every_body_of_the_schema_is_tried_here() -> None:
    bodies = {
        c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, BaseModel) and c is not BaseModel
    }
    assert bodies - set(BODIES) == {schema.Body, schema.SamplingFields}


HTTP = [(model, name) for model in BODIES for name in fields_of(model)]


@pytest.mark.parametrize(("model", "name"), HTTP, ids=[f"{model.__name__}-{name}" for model, name in HTTP])
def test_whatever_a_body_holds_is_taken_or_refused_in_one_line_with_name_and_value(
    model: type[BaseModel], name: str
) -> None:
    refused = 0

    @settings(max_examples=30, deadline=None)
    @given(value=WRONG_KIND)
    @example(value={"a\nb": None})
    @example(value={"": None})
    @example(value={"long" * 1000: None})
    def tells(value: object) -> None:
        nonlocal refused
        error = complaint(model, {**BODIES[model], name: value})
        if error is None:
            return
        refused += 1
        assert error.status == 400
        message = error.message
        assert "\n" not in message and len(message) <= LONGEST_MESSAGE, message[:200]
        assert error.param is not None and name in error.param.split(".")[0] + "." + message, (error.param, message)
        json.dumps(error.body())
        if error.code in ("unknown_parameter", "unsupported_parameter") or NO_VALUE.search(message):
            return
        assert any(is_shown(part, message) for part in parts_of(value)), (value, message)

    tells()
    assert refused, "no value of this field was refused"


def parts_of(value: object) -> list[object]:
    """The value and what is in it: the message may be about an element."""
    if isinstance(value, list):
        return [value, *(part for one in value for part in parts_of(one))]
    if isinstance(value, dict):
        return [value, *(part for one in value.values() for part in parts_of(one)), *value]
    return [value]


RANGES: dict[str, tuple[object, str]] = {
    "n": (65, "64"),
    "temperature": (100.5, "100"),
    "top_p": (0, "0"),
    "top_k": (-2, "-1"),
    "min_p": (1.5, "1"),
    "seed": (2**64, str(2**64)),
    "presence_penalty": (-2.5, "-2"),
    "frequency_penalty": (2.5, "2"),
    "repetition_penalty": (0, "0"),
    "min_tokens": (-1, "0"),
    "prompt_logprobs": (21, "20"),
    "draft_temperature": (-0.5, "0"),
    "num_speculative_tokens": (65, "64"),
    "max_tokens": (-1, "0|1"),
    "stop": (["a"] * 17, "16"),
    "stop_token_ids": ([1] * 1025, "1024"),
    "logit_bias": ({"1": 101.0}, r"\[-100, 100\]"),
    "user": ("u" * 257, "256"),
    "verification": ("exact", "'coupled' or 'rejection'"),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("model", [schema.CompletionRequest, schema.ChatCompletionRequest])
def test_a_value_out_of_range_is_refused_with_the_bound_that_it_breaks(model: type[BaseModel], name: str) -> None:
    value, bound = RANGES[name]
    error = complaint(model, {**BODIES[model], name: value})
    assert error is not None and error.param is not None and error.param.split(".")[0] == name
    assert name in error.message and re.search(bound, error.message), error.message
    assert any(is_shown(part, error.message) for part in parts_of(value)), error.message


def test_what_is_not_a_number_never_reaches_the_engine() -> None:
    for model in (schema.CompletionRequest, schema.ChatCompletionRequest):
        for name, field in model.model_fields.items():
            if "float" in str(field.annotation) and "dict" not in str(field.annotation):
                for value in (math.nan, math.inf, -math.inf):
                    error = complaint(model, {**BODIES[model], name: value})
                    assert error is not None and error.param == name, (name, value)


def test_the_checks_see_a_message_that_lacks_a_part() -> None:
    """Twins: each lacks one of name, value, what is allowed, or has two lines, or all of a long value."""
    good = "n=65 is not allowed: a whole number from 1 to 64"
    assert_tells(good, {"n"}, 65)
    twins: list[Callable[[str], str]] = [
        lambda m: m.replace("n=", "value=", 1),
        lambda m: m.replace("65", "that"),
        lambda m: m.partition(":")[0],
        lambda m: m.replace(": ", ":\n"),
        lambda m: m + "x" * LONGEST_MESSAGE,
    ]
    for twin in twins:
        with pytest.raises(AssertionError):
            assert_tells(twin(good), {"n"}, 65)
    assert set(NOT_HONOURED) == {"chat", "completion"}
