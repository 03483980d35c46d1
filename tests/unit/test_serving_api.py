"""The API over a fake engine, as the official client sees it: fields in, answers, streams and usage out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serving_fakes import ANSWER, WAIT_S, FakeEngine, serving

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
FOX = {"include_speculation": True}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, served_model_names=("tiny", "alias")) as server:
        yield server.url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=WAIT_S) as http:
        yield http


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_chat_answers_with_text_and_usage(client: openai.OpenAI, engine: FakeEngine) -> None:
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9)
    assert got.choices[0].message.content == ANSWER[:9] and got.choices[0].finish_reason == "length"
    assert got.object == "chat.completion" and got.model == "tiny" and got.id.startswith("chatcmpl-")
    prompt, params = engine.submitted[-1]
    assert "".join(map(chr, prompt)) == "user: Hi\nassistant:" and params.max_tokens == 9
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (
        len(prompt),
        9,
        9 + len(prompt),
    )
    assert "speculation" not in got.usage.model_extra


def test_chat_streams_one_chunk_per_round_with_role_first_and_usage_last(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="alias", messages=MESSAGES, max_tokens=10, stream=True, stream_options=options
        )
    )
    *parts, last = chunks
    assert [c.choices[0].delta.content for c in parts] == ["T", "he ", "qu", "i", "ck "]
    assert parts[0].choices[0].delta.role == "assistant" and parts[1].choices[0].delta.role is None
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 10 and len({c.id for c in chunks}) == 1


def test_several_answers_are_kept_apart(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, max_tokens=5)
    assert [(c.index, c.message.content) for c in got.choices] == [(i, ANSWER[:5]) for i in range(3)]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, max_tokens=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [ANSWER[:5]] * 3


def test_several_prompts_get_their_choices_in_order(client: openai.OpenAI, engine: FakeEngine) -> None:
    got = client.completions.create(model="tiny", prompt=["a", "bc"], n=2, max_tokens=4)
    assert [c.index for c in got.choices] == [0, 1, 2, 3] and got.usage.prompt_tokens == 2 + 3
    texts: dict[int, str] = {}
    for chunk in client.completions.create(model="tiny", prompt=[[65], [66, 67]], n=2, max_tokens=4, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == dict.fromkeys(range(4), ANSWER[:4])
    assert [prompt for prompt, _ in engine.submitted[-2:]] == [[65], [66, 67]]


def test_a_stop_string_ends_the_answer_and_is_named(client: openai.OpenAI) -> None:
    got = client.completions.create(model="tiny", prompt="x", max_tokens=40, stop=["brown"])
    assert got.choices[0].text == "The quick " and got.choices[0].finish_reason == "stop"
    assert got.choices[0].model_extra["stop_reason"] == "brown"


def test_the_fields_of_the_engine_reach_it(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "repetition_penalty": 1.5,
        "stop_token_ids": [9],
        "verification": "rejection",
        "draft_temperature": 0.5,
        "num_speculative_tokens": 0,
    }
    client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"65": -100},
        extra_body=extra,
    )
    params = engine.submitted[-1][1]
    for name, value in extra.items():
        assert getattr(params, name) in (value, tuple(value) if isinstance(value, list) else value), name
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, 11, 3)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (1, -1, {65: -100.0})


def test_null_is_the_default_of_a_field(http: httpx.Client, engine: FakeEngine) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "user", "tools", "top_k", "logprobs")
    body = {"messages": MESSAGES, "max_tokens": 2, **dict.fromkeys(names)}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.submitted[-1][1].temperature == 1.0 and engine.submitted[-1][1].n == 1


def test_logprobs_come_as_each_api_writes_them(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    assert [entry.token for entry in content] == list("The") and content[0].bytes == [84]
    assert [(top.token, top.logprob) for top in content[1].top_logprobs] == [("h", -0.5), ("0", -2.0)]
    text = client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=2).choices[0].logprobs
    assert text.tokens == list("The") and text.token_logprobs == [-0.5] * 3 and text.text_offset == [0, 1, 2]
    assert text.top_logprobs[0] == {"T": -0.5, "0": -2.0}
    offsets = []
    for chunk in client.completions.create(model="tiny", prompt="x", max_tokens=6, logprobs=1, stream=True):
        offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == list(range(6))


def test_speculation_is_told_when_asked_for(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=6, extra_body=FOX)
    spec = got.usage.model_extra["speculation"]
    assert spec["tokens_per_target_forward"] == 2.5 and spec["rounds"] == {"pre_verify": 4} and spec["seeds"] == [7]
    pearl = got.choices[0].model_extra["pearl"]
    assert pearl["texts"] == list(ANSWER[:6]) and pearl["origins"] == [
        "prefill",
        "pre_verify",
        "post_verify",
        "residual",
        "pre_verify",
        "post_verify",
    ]
    texts: list[str] = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, stream=True, extra_body=FOX
    ):
        texts += chunk.choices[0].model_extra["pearl"]["texts"]
    assert texts == list(ANSWER[:6])


def test_the_async_client_runs_many_at_once_without_mixing_them(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

            async def one(size: int) -> str:
                stream = await client.completions.create(model="tiny", prompt="x", max_tokens=size, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(size) for size in range(1, 40)))

    assert asyncio.run(ask()) == [ANSWER[:size] for size in range(1, 40)]


def test_models_are_listed_and_looked_up(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").model_extra["max_model_len"] == 2000
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-9/x")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_tokenize_and_detokenize_are_inverse(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert ids["tokens"] == [1, *map(ord, "héllo")] and ids["count"] == 6 and ids["max_model_len"] == 2000
    assert ids["token_strs"][1:] == list("héllo")
    assert http.post("/detokenize", json={"tokens": ids["tokens"][1:]}).json() == {"prompt": "héllo"}
    chat = http.post("/tokenize", json={"messages": MESSAGES, "chat_template_kwargs": {"suffix": "!"}}).json()
    assert "".join(map(chr, chat["tokens"])) == "user: Hi\n!assistant:"
    assert http.get("/version").json() == {"version": "1.2.3"}


def test_parts_of_text_are_joined_and_developer_is_the_system(http: httpx.Client, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be."}, {"role": "user", "content": parts}]
    assert http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200
    assert "".join(map(chr, engine.submitted[-1][0])) == "system: Be.\nuser: ab\nassistant:"
