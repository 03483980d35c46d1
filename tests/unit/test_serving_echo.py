"""``echo``: the prompt before the answer, scored as evaluation harnesses expect it, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pearl_ray.core.outputs import Logprob
from pearl_ray.serving.answers import completion_logprobs
from tests.serving_fakes import ANSWER, WAIT_S, FakeEngine, FakeTokenizer, serving

PLAIN = {"add_special_tokens": False}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, served_model_names=("tiny",)) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def joined(client: openai.OpenAI, **fields: Any) -> tuple[dict[int, str], dict[int, dict[str, list[Any]]], Any]:
    """A stream's texts and log-probabilities by choice, and its usage."""
    texts: dict[int, str] = {}
    logprobs: dict[int, dict[str, list[Any]]] = {}
    usage = None
    options = {"include_usage": True}
    for chunk in client.completions.create(model="tiny", stream=True, stream_options=options, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                logprobs.setdefault(choice.index, {}).setdefault(name, []).extend(values or [])
    return texts, logprobs, usage


def test_the_prompt_stands_before_each_answer(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 5, "echo": True}
    got = client.completions.create(model="tiny", **fields)
    expected = {i: prompt + ANSWER[:5] for i, prompt in enumerate(("ab", "ab", "cd", "cd"))}
    assert {c.index: c.text for c in got.choices} == expected and got.usage.completion_tokens == 20
    assert joined(client, **fields)[0] == expected
    assert client.completions.create(model="tiny", prompt=[1, 65, 66], max_tokens=1, echo=True).choices[0].text == (
        "\x01ABT"
    )


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_the_prompts_tokens_are_scored_before_the_answers(client: openai.OpenAI, max_tokens: int) -> None:
    fields: dict[str, Any] = {"prompt": "xyz", "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    got = client.completions.create(model="tiny", extra_body=PLAIN, **fields)
    [choice] = got.choices
    assert choice.text == "xyz" + ANSWER[:max_tokens] and choice.finish_reason == "length"
    logprobs = choice.logprobs
    assert logprobs.tokens == list(choice.text) and logprobs.text_offset == list(range(3 + max_tokens))
    assert logprobs.token_logprobs == [None, -1.0, -2.0] + [-0.5] * max_tokens
    assert logprobs.top_logprobs[:3] == [None, {"y": -1.0, "~": -0.25}, {"z": -2.0, "~": -0.25}]
    assert "prompt_logprobs" not in choice.model_extra
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (3, max_tokens)
    texts, streamed, usage = joined(client, extra_body=PLAIN, **fields)
    assert texts == {0: choice.text} and streamed == {0: logprobs.model_dump()}
    assert usage.completion_tokens == max_tokens


def test_a_streams_prompt_is_scored_by_a_request_of_its_own_whose_latency_is_not_counted(
    client: openai.OpenAI, engine: FakeEngine, url: str
) -> None:
    def count() -> float:
        lines = httpx.get(f"{url}/metrics", timeout=WAIT_S).text.splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("pearl:e2e_request_latency_seconds_count"))

    before, submitted = count(), len(engine.submitted)
    joined(client, prompt="xyz", max_tokens=4, echo=True, logprobs=2, n=2)
    assert count() == before + 1
    scoring, answering = (params for _, params in engine.submitted[submitted:])
    assert (scoring.max_tokens, scoring.prompt_logprobs, scoring.n) == (1, 2, 1)
    assert (answering.max_tokens, answering.prompt_logprobs, answering.n) == (4, None, 2)
    assert not engine.running


def test_what_is_asked_of_the_prompt_alone_is_given_too(client: openai.OpenAI) -> None:
    extra = {**PLAIN, "prompt_logprobs": 0, "include_speculation": True}
    got = client.completions.create(model="tiny", prompt="xy", max_tokens=0, echo=True, extra_body=extra)
    assert got.choices[0].model_extra["prompt_logprobs"][1]["121"]["logprob"] == -1.0 and got.choices[0].text == "xy"
    assert got.choices[0].model_extra["pearl"] == {"token_ids": [], "texts": [], "origins": []}


def test_nothing_to_generate_is_refused_without_an_echo(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="echo") as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=0)
    assert caught.value.param == "max_tokens"
    for field, value, word in (("best_of", 2, "send n"), ("suffix", "end", "prompt")):
        with pytest.raises(openai.BadRequestError, match=word) as caught:
            client.completions.create(model="tiny", prompt="x", extra_body={field: value})
        assert caught.value.param == field and caught.value.code == "unsupported_parameter"


def test_of_candidates_that_are_written_alike_the_likelier_is_told() -> None:
    same = {7: Logprob(-3.0, 2, "a"), 8: Logprob(-0.1, 1, "a"), 9: Logprob(-5.0, 3, "a")}
    written = completion_logprobs([same, {65: Logprob(-1.0, 1, "")}], 3, 0, FakeTokenizer())
    assert written["top_logprobs"] == [{"a": -0.1}, {"A": -1.0}] and written["token_logprobs"] == [-3.0, -1.0]
