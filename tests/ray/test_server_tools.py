"""Tools and structured outputs over a real deployment on Ray: the tiny pair, which writes noise by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

from pearl_ray import PearlConfig, PearlEngine
from pearl_ray.serving.backend import Model, RayEngine
from pearl_ray.serving.server import HttpServer, bind
from pearl_ray.serving.settings import ServerSettings
from tests.tiny import JSON_PIECES, tiny_pair

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}, "days": {"$ref": "#/$defs/days"}},
        "required": ["unit", "days"], "additionalProperties": False,
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 14}}}  # fmt: skip
SUM = {"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
       "required": ["sum"], "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def client(ray_session, tmp_path_factory) -> Iterator[openai.OpenAI]:
    """Of a deployment of the tiny pair that can spell JSON."""
    target, draft = tiny_pair(tmp_path_factory.mktemp("json"), vocab_size=128, pieces=JSON_PIECES)
    config = PearlConfig(
        target_model=str(target),
        draft_model=str(draft),
        dtype="float64",
        num_speculative_tokens=4,
        max_model_len=2048,
        kv_cache_blocks=1024,
    )
    with (
        PearlEngine(config) as engine,
        HttpServer(ServerSettings(served_model_names=("tiny",)), bind("127.0.0.1", 0)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        server.attach(RayEngine(engine.coordinator), Model(engine.tokenizer, 2048))
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_always_parses_and_fits_the_functions_parameters(client, choice) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 1000, "n": 2}
    names = set()
    for seed in range(2):
        got = client.chat.completions.create(**body, seed=seed)
        for answer in got.choices:
            calls = answer.message.tool_calls
            assert len(calls) == 1 or choice == "required"
            for call in calls:
                names.add(call.function.name)
                schema = CITY if call.function.name == "get_weather" else {"type": "object", "maxProperties": 0}
                jsonschema.validate(json.loads(call.function.arguments), schema)
            assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert names <= ({"get_weather", "now"} if choice == "required" else {"get_weather"})
    streamed = [
        call
        for chunk in client.chat.completions.create(**body, seed=1, stream=True)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert sorted(call.function.arguments for call in streamed) == sorted(
        call.function.arguments for answer in got.choices for call in answer.message.tool_calls
    )


def test_the_clients_own_helper_for_tools_is_served(client) -> None:
    """Pydantic tools are ``strict``, and the model may choose; this one writes noise, in which there is no call."""

    class Weather(pydantic.BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Weather)
    body = {"model": "tiny", "messages": MESSAGES, "tools": [tool], "max_tokens": 1000, "seed": 1, "stop": ["e"]}
    got = client.chat.completions.parse(**body)
    assert got.choices[0].message.content and not got.choices[0].message.tool_calls


def test_beside_tools_an_answer_is_calls_or_fits_its_schema(client) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": SUM}}
    body = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS[:1], "max_tokens": 1000}
    got = client.chat.completions.create(**body, response_format=wanted, n=8, seed=2, temperature=1.5)
    for answer in got.choices:
        if answer.message.tool_calls:
            assert answer.finish_reason == "tool_calls" and answer.message.content is None
        else:
            jsonschema.validate(json.loads(answer.message.content), SUM)
            assert answer.finish_reason == "stop"
    forced = client.chat.completions.create(**body, response_format=wanted, tool_choice="required", seed=1)
    assert forced.choices[0].message.tool_calls and forced.choices[0].message.content is None


def test_an_answer_fits_its_schema_and_a_bad_schema_is_refused(client) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": CITY}}
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=wanted, max_tokens=1000, n=2)
    for answer in got.choices:
        jsonschema.validate(json.loads(answer.message.content), CITY)
        assert answer.finish_reason == "stop"
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    text = client.completions.create(model="tiny", prompt="a", max_tokens=9, extra_body=extra).choices[0].text
    assert text in ("yes", "no")
    wanted["json_schema"]["schema"] = {"type": "strange"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=wanted)
    assert caught.value.param == "response_format" and "strange" in caught.value.message
    bad: Any = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "?"}}}}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=bad, tool_choice="required")
    assert caught.value.param == "tools"
