"""Tools over the API: parsers on texts as larger models write them, what the model is told, what a forced call is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import openai
import pytest

from pearl_ray.serving.tool_parsers import Call, HermesParser, LlamaParser, Parser
from pearl_ray.serving.tools import Dialect, dialect_of
from tests.serving_fakes import FakeEngine, FakeTokenizer, asking, serving

NAMES = ("get_weather", "search")
PARIS, OSLO = Call("get_weather", '{"city": "Paris"}'), Call("get_weather", '{"city": "Oslo"}')
FIND = Call("search", '{"query": "a </tool_call> in \\"text\\" {", "filters": {"tags": ["é"], "n": 2.5}}')
HERMES_PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
UNKNOWN = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
NO_NUMBER = '<tool_call>{"name": "search", "arguments": {"q": NaN}}'

# What was written, what of it is for the reader, and what is called.
HERMES: list[tuple[str, str, list[Call]]] = [
    ("It is sunny.\n", "It is sunny.\n", []),
    (HERMES_PARIS, "", [PARIS]),
    (HERMES_PARIS.replace("\n", ""), "", [PARIS]),
    (HERMES_PARIS.removesuffix("\n</tool_call>"), "", [PARIS]),
    (f"Let me look.\n\n{HERMES_PARIS}\n{HERMES_PARIS.replace('Paris', 'Oslo')}", "Let me look.", [PARIS, OSLO]),
    (f"{HERMES_PARIS}\nDone.", "\nDone.", [PARIS]),
    (f'<tool_call>\n{{"arguments": {FIND.arguments}, "name": "search"}}\n</tool_call>', "", [FIND]),
    ('<tool_call>{"name": "search"}</tool_call>', "", [Call("search", "{}")]),
    ("a <tool> b <tool_call", "a <tool> b <tool_call", []),
    ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    (UNKNOWN, UNKNOWN, []),
    (NO_NUMBER, NO_NUMBER, []),
    ('<tool_call>\n{"name": "search", "argum', '<tool_call>\n{"name": "search", "argum', []),
]
LLAMA_PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
LLAMA: list[tuple[str, str, list[Call]]] = [
    ("It is {sunny}.", "It is {sunny}.", []),
    (LLAMA_PARIS, "", [PARIS]),
    (f"\n{LLAMA_PARIS}\n", "", [PARIS]),
    (f"<|python_tag|>{LLAMA_PARIS}", "", [PARIS]),
    ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (f"{LLAMA_PARIS}; {LLAMA_PARIS.replace('Paris', 'Oslo')}", "", [PARIS, OSLO]),
    (f"<|python_tag|>{LLAMA_PARIS}\n<|python_tag|>{LLAMA_PARIS.replace('Paris', 'Oslo')}", "", [PARIS, OSLO]),
    (f"I'll look. <|python_tag|>{LLAMA_PARIS}", "I'll look.", [PARIS]),
    (f'{{"name": "search", "parameters": {FIND.arguments}}}', "", [FIND]),
    ('{"answer": 42} is it', '{"answer": 42} is it', []),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ('{"name": "search", "param', '{"name": "search", "param', []),
]


def read(parser: Parser, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    parsed = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(one.text for one in parsed), [call for one in parsed for call in one.calls]


@pytest.mark.parametrize(
    ("make", "text", "said", "calls"),
    [(HermesParser, *sample) for sample in HERMES] + [(LlamaParser, *sample) for sample in LLAMA],
)
def test_calls_are_read_out_of_a_text_however_it_is_cut(
    make: Callable[[Sequence[str]], Parser], text: str, said: str, calls: list[Call]
) -> None:
    for size in (1, 2, 3, 7, len(text)):
        assert read(make(NAMES), [text[i : i + size] for i in range(0, len(text), size)]) == (said, calls), size


def test_text_before_a_call_is_not_held_back() -> None:
    parser = HermesParser(NAMES)
    assert parser.feed("Let me look").text == "Let me look" and parser.feed(" <tool_").text == ""
    assert parser.feed("box>").text == " <tool_box>"


def test_the_form_of_calls_is_found_in_the_template() -> None:
    def found(says: str) -> Dialect:
        return dialect_of(FakeTokenizer(says), "auto")

    assert found("") == Dialect("hermes", False)
    assert found("return <tool_call>{}</tool_call>") == Dialect("hermes", True)
    assert found('{"name": function name, "parameters": dictionary}') == Dialect("llama3_json", True)
    assert found("[AVAILABLE_TOOLS]") == Dialect(None, True)
    assert dialect_of(FakeTokenizer("[AVAILABLE_TOOLS]"), "hermes") == Dialect("hermes", True)


# -- over HTTP ----------------------------------------------------------------------------------------------------

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/c"}},
    "required": ["city"],
    "$defs": {"c": {"type": "string"}},
}
NO_SCHEMA = "response_format.json_schema.schema"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": CITY}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "search"}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def ask(text: str, says: str = "", **fields: Any) -> tuple[Any, list[Any], FakeEngine]:
    """The answer, the same one streamed, and the engine."""
    engine = FakeEngine(text=text, once=True)
    body = {"model": "default", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 500, **fields}
    with (
        serving(engine, FakeTokenizer(says)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(**body)
        return whole, list(client.chat.completions.create(**body, stream=True)), engine


def prompt_of(engine: FakeEngine) -> str:
    return "".join(map(chr, engine.submitted[-1][0]))


def test_a_call_comes_whole_and_streamed_as_the_official_client_expects_it() -> None:
    whole, chunks, _ = ask(f"Let me look.\n{HERMES_PARIS}\n{HERMES_PARIS.replace('Paris', 'Oslo')}", n=2)
    for choice in whole.choices:
        assert choice.message.content == "Let me look." and choice.finish_reason == "tool_calls"
        assert [Call(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [PARIS, OSLO]
    assert len({c.id for choice in whole.choices for c in choice.message.tool_calls}) == 4
    streamed: dict[tuple[int, int], Call] = {}
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.id.startswith("call_") and call.type == "function"
            streamed[chunk.choices[0].index, call.index] = Call(call.function.name, call.function.arguments)
    assert streamed == {(0, 0): PARIS, (0, 1): OSLO, (1, 0): PARIS, (1, 1): OSLO}
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["tool_calls"] * 2
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == 0)
    assert said == "Let me look." and chunks[0].choices[0].delta.role == "assistant"


def test_an_answer_without_a_call_is_an_answer_and_one_call_can_be_asked_for() -> None:
    whole, chunks, _ = ask("It is sunny.", tool_choice="auto")
    assert whole.choices[0].message.content == "It is sunny." and whole.choices[0].message.tool_calls is None
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    whole, _, _ = ask(HERMES_PARIS * 2, parallel_tool_calls=False)
    assert len(whole.choices[0].message.tool_calls) == 1 and whole.choices[0].message.content is None
    whole, _, engine = ask(HERMES_PARIS, tool_choice="none")
    assert whole.choices[0].message.content == HERMES_PARIS and prompt_of(engine) == "user: Hi\nassistant:"


@pytest.mark.parametrize(
    ("says", "key", "end"),
    [
        ("", "arguments", "<tool_call>\n"),
        ("<tool_call>", "arguments", "<tool_call>\n"),
        ('"parameters": dictionary', "parameters", ""),
    ],
)
def test_a_forced_call_is_held_to_a_schema_of_the_functions(says: str, key: str, end: str) -> None:
    answer = json.dumps({"name": "get_weather", key: {"city": "Paris"}})
    for choice, others in (("required", True), (NAMED, False)):
        whole, chunks, engine = ask(answer, says, tool_choice=choice, parallel_tool_calls=False)
        assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
        [call] = whole.choices[0].message.tool_calls
        assert Call(call.function.name, call.function.arguments) == PARIS
        assert prompt_of(engine).endswith(f"assistant:{end}")
        schema = json.loads(engine.submitted[-1][1].structured_outputs.json)
        jsonschema.Draft202012Validator.check_schema(schema)
        valid = jsonschema.Draft202012Validator(schema).is_valid
        assert valid(json.loads(answer)) and valid({"name": "search", key: {}}) == others
        assert not valid({"name": "get_weather", key: {"city": 3}}) and not valid({"name": "get_weather"})
        assert not valid({"name": "rm", key: {}}) and not valid({"name": "search", key: {"x": 1}})


def test_calls_that_must_be_made_may_be_several() -> None:
    inner = HERMES_PARIS.removeprefix("<tool_call>\n")
    whole, _, engine = ask(f"{inner}\n{HERMES_PARIS.replace('Paris', 'Oslo')}", tool_choice="required")
    calls = whole.choices[0].message.tool_calls
    assert [Call(c.function.name, c.function.arguments) for c in calls] == [PARIS, OSLO]
    assert whole.choices[0].message.content is None and engine.submitted[-1][1].structured_outputs.grammar is not None
    _, _, engine = ask(inner, tool_choice=NAMED)
    assert engine.submitted[-1][1].structured_outputs.json is not None


def test_a_strict_function_is_held_to_its_schema_where_the_model_may_choose() -> None:
    for strict in (True, False):
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": strict}}]
        whole, _, engine = ask(f"Let me look.\n{HERMES_PARIS}", tools=tools)
        assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content == "Let me look."
        wanted = engine.submitted[-1][1].structured_outputs
        assert (wanted is not None and wanted.grammar is not None) == strict
        assert prompt_of(engine).endswith("assistant:")


def test_a_forced_call_that_is_cut_by_its_length_is_no_call() -> None:
    whole, chunks, _ = ask('{"name": "search", "arguments": {}}', tool_choice="required", max_tokens=20)
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.choices[0].message.tool_calls is None and whole.choices[0].message.content == '{"name": "search", "'


CONVERSATION: list[Any] = [
    {"role": "system", "content": "Be brief."},
    *MESSAGES,
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": "Nothing."},
]  # fmt: skip


def test_calls_and_results_of_the_conversation_reach_the_model() -> None:
    _, _, engine = ask("Nothing was found.", "<tool_call>", messages=CONVERSATION)
    prompt = prompt_of(engine)
    assert prompt.startswith("<tool_call> get_weather search\nsystem: Be brief.") and "tool: Nothing." in prompt
    assert "'arguments': {'q': 'x'}" in prompt


def test_a_template_without_tools_is_helped_by_a_system_message() -> None:
    _, _, engine = ask("Nothing was found.", messages=CONVERSATION)
    prompt = prompt_of(engine)
    assert prompt.startswith("system: Be brief.\n\n# Tools") and '"name": "get_weather"' in prompt
    assert '<tool_call>\n{"name": "search", "arguments": {"q": "x"}}\n</tool_call>' in prompt
    assert "user: <tool_response>\nNothing.\n</tool_response>" in prompt


def test_an_answer_goes_back_into_the_conversation_as_it_came() -> None:
    whole, _, _ = ask(HERMES_PARIS)
    message = whole.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain."}
    for form in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        again, _, engine = ask("It rains.", messages=[*MESSAGES, form, result])
        assert again.choices[0].message.content == "It rains." and "Rain." in prompt_of(engine)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1"}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice", "'rm'"),
        ({"tool_choice": {"type": "function", "name": "search"}}, "tool_choice.name", "unrecognized"),
        ({"tools": TOOLS[:1] * 2}, "tools", "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "tool_choice: none"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "role tool"),
        ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, "messages.0.tool_calls", "assistant"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
            "messages.0.tool_calls.0.function.arguments",
            "object",
        ),
    ],
)
def test_what_of_tools_can_not_be_honoured_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    with asking(FakeEngine()) as client:
        body = {"messages": MESSAGES, "tools": TOOLS, **fields}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"], error


def test_a_form_that_is_not_known_is_refused_until_one_is_chosen() -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 3}
    for chosen, status in (("auto", 400), ("llama3_json", 200)):
        with asking(FakeEngine(), FakeTokenizer("[AVAILABLE_TOOLS]"), tool_call_parser=chosen) as client:
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == status and ("--tool-call-parser" in response.text) == (status == 400)


# -- structured outputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "name", "value"),
    [
        ("chat/completions", {"response_format": {"type": "text"}}, None, None),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "json_object", True),
        ("chat/completions", {"response_format": SCHEMA}, "json", json.dumps(CITY)),
        ("chat/completions", {"structured_outputs": {"choice": ["a", "b"]}}, "choice", ("a", "b")),
        ("completions", {"structured_outputs": {"json": CITY}}, "json", json.dumps(CITY)),
        ("completions", {"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ("completions", {"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
    ],
)
def test_what_an_answer_must_look_like_reaches_the_engine(path: str, fields: Any, name: str | None, value: Any) -> None:
    engine = FakeEngine()
    prompt = {"prompt": "x"} if path == "completions" else {"messages": MESSAGES}
    with asking(engine) as client:
        assert client.post(f"/v1/{path}", json={**prompt, **fields, "max_tokens": 2}).status_code == 200
    wanted = engine.submitted[-1][1].structured_outputs
    assert wanted is None if name is None else getattr(wanted, name) == value


@pytest.mark.parametrize("strict", [False, True])
def test_a_format_beside_tools_holds_what_is_no_call(strict: bool) -> None:
    engine = FakeEngine()
    function = {"name": "search", "parameters": CITY, "strict": strict}
    body = {"messages": MESSAGES, "tools": [{"type": "function", "function": function}], "max_tokens": 2}
    wanted = []
    with asking(engine) as client:
        for fields in ({"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": "none"}):
            response = client.post("/v1/chat/completions", json={**body, **fields, "response_format": SCHEMA})
            assert response.status_code == 200, response.text
            wanted.append(engine.submitted[-1][1].structured_outputs)
        response = client.post("/v1/chat/completions", json={**body, "response_format": {"type": "json_schema"}})
        assert response.json()["error"]["param"] == NO_SCHEMA
    auto, required, none = wanted
    assert "answer:" in auto.grammar and '"search"' in auto.grammar and none.json == json.dumps(CITY)
    assert "answer:" not in (required.grammar or required.json)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, NO_SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, NO_SCHEMA),
        ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": "no schema"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs"),
        ({"structured_outputs": {"lark": "x"}}, "structured_outputs.lark"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_a_bad_schema_is_refused_by_the_name_of_its_field(fields: dict[str, Any], param: str) -> None:
    with asking(FakeEngine()) as client:
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
