"""As a user types it: ray start --head, pearl-ray serve --detach, the official client, pearl-ray stop.

With the tiny pair; the embedded pair on eight shards, as the README has it, is slow.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

from pearl_ray import env
from tests.ray.machine import Machine, command_line, processes_of
from tests.serving_fakes import is_refused, scraped, wait_until
from tests.tiny import JSON_PIECES, tiny_pair

TYPED = ["serve", "--draft-tp", "1", "--target-tp", "7", "--detach"]
MESSAGES: list[Any] = [{"role": "user", "content": "Why is the sky blue?"}]
CITY = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
        "required": ["unit", "days"], "additionalProperties": False}  # fmt: skip
TOOLS: list[Any] = [{"type": "function", "function": {"name": "forecast", "parameters": CITY}}]
GREEDY: Any = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}


class Forecast(pydantic.BaseModel):
    days: int
    sunny: bool


class Served:
    """A deployment that was typed: the clients' addresses, and whether its arithmetic is exact (float64)."""

    def __init__(self, machine: Machine, url: str, exact: bool) -> None:
        self.machine, self.url, self.exact = machine, url, exact
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300)
        self.model = self.client.models.list().data[0].id

    def same(self, one: str, other: str) -> bool:
        """In float32 a tie may fall another way in another batch, never in the first characters here."""
        return one == other if self.exact else one[:12] == other[:12]

    def greedy(self, **fields: Any) -> Any:
        return self.client.chat.completions.create(model=self.model, **{**GREEDY, **fields})


@contextmanager
def new_machine() -> Iterator[Machine]:
    """One for all tests of a module, with nothing left behind."""
    folder = Path(tempfile.mkdtemp(prefix="pr", dir="/tmp"))  # short: Ray's sockets lie below it
    machine = Machine(folder)
    try:
        yield machine
    finally:
        machine.end()
        left = [command_line(process) for process in processes_of(-1, machine.rays)]
        shutil.rmtree(folder, ignore_errors=True)
    assert left == []


def pearl_ray(machine: Machine, *args: str) -> subprocess.CompletedProcess[str]:
    environment = machine.environment(PEARL_CACHE_DIR=str(env.cache_dir()), RAY_AUTH_MODE="disabled")
    command = [sys.executable, "-m", "pearl_ray.cli", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    typed = [*TYPED, "--port", "0"]
    if request.param == "tiny":
        target, draft = tiny_pair(tmp_path_factory.mktemp("json"), vocab_size=128, pieces=JSON_PIECES)
        models = ["--target-model", str(target), "--draft-model", str(draft), "--dtype", "float64"]
        sizes = ["--num-speculative-tokens", "4", "--max-model-len", "2048", "--kv-cache-blocks", "512"]
        typed = ["serve", "--detach", "--port", "0", *models, *sizes]
    with new_machine() as machine:
        machine.start_head(RAY_AUTH_MODE="disabled")
        done = pearl_ray(machine, *typed)
        assert done.returncode == 0, done.stdout + done.stderr
        url = re.search(r"http://\S+(?=/v1)", done.stdout)
        assert url is not None, done.stdout
        served = Served(machine, url[0], exact=request.param == "tiny")
        yield served
        served.client.close()
        stopped = pearl_ray(machine, "stop", "--shutdown-timeout", "20")
        assert stopped.returncode == 0, stopped.stderr
        wait_until(lambda: is_refused(served.url))


def test_a_chat_is_answered_whole_and_streamed(served: Served) -> None:
    whole = served.greedy()
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason in ("stop", "length") and whole.usage.completion_tokens <= 24
    chunks = list(served.greedy(stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert served.same(said, text) and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    stop = text[-3:]  # the client's helper takes a cut answer for an error
    with served.client.chat.completions.stream(model=served.model, stop=[stop], **GREEDY) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert served.same(final.choices[0].message.content or "", text[: text.index(stop)])


def test_several_answers_differ_and_their_seed_repeats_them(served: Served) -> None:
    one, two = (served.greedy(n=2, temperature=1.0, seed=7, max_tokens=16) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert len(texts) == 2 and texts[0] != texts[1] and one.usage.completion_tokens <= 32
    for text, choice in zip(texts, two.choices, strict=True):
        assert served.same(text, choice.message.content) or not served.exact


def test_logprobs_of_a_greedy_answer_are_the_likeliest(served: Served) -> None:
    got = served.greedy(logprobs=True, top_logprobs=3, max_tokens=8)
    content = got.choices[0].logprobs.content
    assert 0 < len(content) <= 8
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-6)
    assert (got.choices[0].message.content or "").startswith("".join(entry.token for entry in content[:4]))


def test_a_prompt_is_scored_by_echo(served: Served) -> None:
    fields: Any = {"model": served.model, "prompt": "The capital of France is Paris", "temperature": 0, "echo": True}
    scored = served.client.completions.create(max_tokens=0, logprobs=1, **fields).choices[0]
    assert scored.text == fields["prompt"] and scored.logprobs.token_logprobs[0] is None
    assert len(scored.logprobs.tokens) > 3 and all(x <= 0 for x in scored.logprobs.token_logprobs[1:])
    more = served.client.completions.create(max_tokens=1, logprobs=1, **fields).choices[0]  # as lm-eval asks
    assert more.logprobs.token_logprobs[1:-1] == pytest.approx(scored.logprobs.token_logprobs[1:], abs=1e-3)


def test_a_stop_string_cuts_the_answer(served: Served) -> None:
    text = served.greedy().choices[0].message.content or ""
    stop = text[6:9]
    got = served.greedy(stop=[stop]).choices[0]
    assert got.finish_reason == "stop" and got.message.content == text[: text.index(stop)]
    assert got.model_extra["stop_reason"] == stop


def test_an_answer_fits_a_schema_by_response_format_or_by_pydantic(served: Served) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": CITY}}
    got = served.greedy(response_format=wanted, max_tokens=300).choices[0]
    jsonschema.validate(json.loads(got.message.content or ""), CITY)
    body = {"model": served.model, "messages": MESSAGES, "temperature": 0.5, "seed": 3, "max_tokens": 300}
    parsed = served.client.chat.completions.parse(response_format=Forecast, **body).choices[0].message.parsed
    assert isinstance(parsed, Forecast)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}])
def test_a_forced_call_fits_and_comes_back_as_a_result(served: Served, choice: Any) -> None:
    got = served.greedy(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=300).choices[0]
    [call] = got.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    assert got.finish_reason == "tool_calls" and call.function.name == "forecast"
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    again = served.greedy(messages=[*MESSAGES, got.message, result], tools=TOOLS, max_tokens=4)
    assert again.choices[0].finish_reason in ("stop", "length")


def test_errors_are_those_that_the_client_knows(served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        served.greedy(temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(model=served.model, prompt=[5] * 100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        served.greedy(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.completions.create(model=served.model, prompt="x", suffix="y")
    assert caught.value.code == "unsupported_parameter"


def test_the_async_client_streams_many_at_once(served: Served) -> None:
    alone = [served.greedy(max_tokens=size).choices[0].message.content for size in (4, 8, 12)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=300) as client:

            async def one(size: int) -> str:
                body = {**GREEDY, "max_tokens": size}
                stream = await client.chat.completions.create(model=served.model, stream=True, **body)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            whole = await client.chat.completions.create(model=served.model, **GREEDY)
            assert whole.choices[0].message.content
            return await asyncio.gather(*(one(size) for size in (4, 8, 12)))

    assert all(map(served.same, asyncio.run(ask()), alone))


def test_the_cache_is_empty_afterwards(served: Served) -> None:
    empty = ("pearl:num_requests_running 0.0", 'pearl:kv_cache_usage_perc{model="target"} 0.0')
    wait_until(lambda: all(line in scraped(served.url) for line in empty))
    assert 'pearl:recoveries_total{role="target"} 0.0' in scraped(served.url)
    status = pearl_ray(served.machine, "status", "--json")
    assert json.loads(status.stdout)["state"] == "ready", status.stderr
