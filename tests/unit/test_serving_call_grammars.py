"""What answers with calls are held to, walked token by token: what may be said, and what may not."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from pearl_ray.core.errors import ConfigError
from pearl_ray.core.params import StructuredOutputsParams
from pearl_ray.model.grammar import GrammarCompiler
from pearl_ray.model.tokenizer import Tokenizer
from pearl_ray.serving.call_grammars import ARGUMENTS, Form, answer_or_calls, calls_alone, text_or_calls
from pearl_ray.serving.schema import FunctionDefinition
from tests.tiny import EOS_ID, JSON_PIECES, tiny_tokenizer

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/c"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"c": {"type": "string"}},
}
FUNCTIONS = (
    FunctionDefinition(name="get_weather", parameters=CITY, strict=True),
    FunctionDefinition(name="search", parameters=CITY),
)
FORMS: tuple[Form, ...] = ("hermes", "llama3_json")


@functools.cache
def compiler() -> GrammarCompiler:
    tokenizer = Tokenizer(tiny_tokenizer(JSON_PIECES))
    return GrammarCompiler(tokenizer, len(tokenizer.tokens))


def is_answer(wanted: StructuredOutputsParams, text: str) -> bool:
    """Whether the text may be said and ended there; every character is a token."""
    state = compiler().state(wanted)
    for char in text:
        token = JSON_PIECES.index(char) + 2
        mask = state.mask_after([])
        if mask is None or not mask[token]:
            return False
        state.accept([token])
    mask = state.mask_after([])
    return mask is not None and bool(mask[EOS_ID])


def call(form: Form, name: str, **arguments: object) -> str:
    return json.dumps({"name": name, ARGUMENTS[form]: arguments})


def marked(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize("several", [True, False])
def test_hermes_text_may_have_calls_and_a_strict_ones_arguments_fit(several: bool) -> None:
    wanted = text_or_calls(FUNCTIONS, "hermes", several=several)
    good, loose = call("hermes", "get_weather", city="Oslo"), call("hermes", "search", whatever=3)
    for text in ("", "It is {sunny}.\n", "a < b <tool_", marked(good), marked(loose), f"Look.\n{marked(good)}"):
        assert is_answer(wanted, text), text
    for text in (f"{marked(good)}\n{marked(loose)}", f"{marked(good)} Done."):
        assert is_answer(wanted, text) == several, text
    for text in (
        marked(call("hermes", "get_weather", city=3)),
        marked(call("hermes", "get_weather")),
        marked(call("hermes", "rm")),
        "<tool_call> is how",
        marked(good).removesuffix(">"),
    ):
        assert not is_answer(wanted, text), text


@pytest.mark.parametrize("several", [True, False])
def test_a_llama_answer_is_text_or_calls(several: bool) -> None:
    wanted = text_or_calls(FUNCTIONS, "llama3_json", several=several)
    good, loose = call("llama3_json", "get_weather", city="Oslo"), call("llama3_json", "search", whatever=3)
    for text in ("", "It is {sunny}.\n", good, loose):
        assert is_answer(wanted, text), text
    assert is_answer(wanted, f"{good}; {loose}") == several
    for text in (call("llama3_json", "get_weather", city=3), "{", f"{good} Done."):
        assert not is_answer(wanted, text), text


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_must_be_made_fits_whether_strict_or_not_and_may_be_several(form: Form) -> None:
    one, other = call(form, "get_weather", city="Oslo"), call(form, "search", city="Rome")
    between, end = ("\n</tool_call>\n<tool_call>\n", "\n</tool_call>") if form == "hermes" else ("; ", "")
    single, many = (calls_alone(FUNCTIONS, form, several=several) for several in (False, True))
    assert is_answer(single, one) and not is_answer(single, one + between + other + end)
    for text in (one + end, other + end, one + between + other + end, one + between + one + between + other + end):
        assert is_answer(many, text), text
    for text in ("", "Hi", call(form, "search", whatever=3) + end, one + between + end):
        assert not is_answer(single, text) and not is_answer(many, text), text


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_by_a_schema_or_calls_and_nothing_else(form: Form, several: bool) -> None:
    def written(text: str) -> str:
        return marked(text) if form == "hermes" else text

    answer = {"type": "object", "properties": {"sum": {"$ref": "#/$defs/n"}}, "required": ["sum"]}
    answer |= {"additionalProperties": False, "$defs": {"n": {"type": "integer"}}}
    held = StructuredOutputsParams(json=answer)
    wanted = answer_or_calls(FUNCTIONS, form, several=several, answer=held)
    good, loose = call(form, "get_weather", city="Oslo"), call(form, "search", whatever=3)
    for text in ('{"sum": 3}', written(good), written(loose)):
        assert is_answer(wanted, text), text
    between = "\n" if form == "hermes" else "; "
    assert is_answer(wanted, written(good) + between + written(loose)) == several
    for text in (
        "",
        "Look.",
        '{"sum": "3"}',
        '{"sum": 3} Done.',
        '{"sum": 3}' + between + written(good),
        f"Look.\n{written(good)}",
        written(call(form, "get_weather", city=3)),
        written(call(form, "rm")),
    ):
        assert not is_answer(wanted, text), text
    any_object = answer_or_calls(FUNCTIONS, form, several=several, answer=StructuredOutputsParams(json_object=True))
    assert is_answer(any_object, '{"a": [1]}') and is_answer(any_object, written(good))
    assert not is_answer(any_object, "[1]")


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_are_no_schema_are_refused_in_one_line(form: Form) -> None:
    bad = (FunctionDefinition(name="f", parameters={"properties": {"x": {"type": "strange"}}}, strict=True),)
    for wanted in (
        text_or_calls(bad, form, several=True),
        calls_alone(bad, form, several=True),
        calls_alone(bad, form, several=False),
        answer_or_calls(bad, form, several=True, answer=StructuredOutputsParams(json_object=True)),
        answer_or_calls(FUNCTIONS, form, several=True, answer=StructuredOutputsParams(json={"type": "strange"})),
    ):
        with pytest.raises(ConfigError, match="strange") as caught:
            compiler().check(wanted)
        assert caught.value.field in ("json", "grammar") and "\n" not in str(caught.value.allowed)
