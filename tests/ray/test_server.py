"""The server over a real deployment on Ray, asked by the official client; the same text as without HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from pearl_ray import PearlConfig, PearlEngine, SamplingParams
from pearl_ray.deployment import deploy
from pearl_ray.running import stop_deployment
from pearl_ray.serving.backend import Model, RayEngine
from pearl_ray.serving.http_actor import start_http_actor
from pearl_ray.serving.http_handle import drain_http_actor, find_http_actor
from pearl_ray.serving.server import HttpServer, bind
from pearl_ray.serving.settings import ServerSettings
from tests.odd_bodies import Memory, throw
from tests.serving_fakes import WAIT_S, is_refused, scraped, wait_until

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30)
LONG = {"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "stream": True}
LONGER = {**LONG, "max_tokens": 32_000}  # minutes long; for deployments with ROOM
ROOM = {"max_model_len": 32_768, "kv_cache_blocks": 2304}


def config(dirs: tuple[Path, Path], **changes: object) -> PearlConfig:
    values = {
        "target_model": str(dirs[0]),
        "draft_model": str(dirs[1]),
        "dtype": "float64",
        "num_speculative_tokens": 4,
        "max_model_len": 512,
        "kv_cache_blocks": 256,
    }
    return PearlConfig(**values | changes)


def is_idle(engine: PearlEngine) -> bool:
    """Whether nothing runs, waits or holds a block."""
    stats = engine.stats()
    return not (stats["num_requests_running"] or stats["num_requests_waiting"]) and set(
        stats["kv_cache_usage_perc"].values()
    ) == {0.0}


@pytest.fixture(scope="module")
def engine(ray_session, tiny_dirs) -> Iterator[PearlEngine]:
    with PearlEngine(config(tiny_dirs)) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: PearlEngine) -> Iterator[str]:
    settings = ServerSettings(served_model_names=("tiny",))
    with HttpServer(settings, bind("127.0.0.1", 0)) as server:
        server.attach(RayEngine(engine.coordinator), Model(engine.tokenizer, 512))
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_completions_are_the_engines_own_text_whole_and_streamed(client, engine) -> None:
    [own] = engine.generate(PROMPT, GREEDY)
    got = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=30, extra_body={"include_speculation": True}
    )
    assert got.choices[0].text == own.outputs[0].text and got.choices[0].finish_reason == own.outputs[0].finish_reason
    pearl = got.choices[0].model_extra["pearl"]
    assert pearl["token_ids"] == list(own.outputs[0].token_ids) and pearl["origins"] == list(own.outputs[0].origins)
    assert "".join(pearl["texts"]) == got.choices[0].text
    spec = got.usage.model_extra["speculation"]
    assert spec["tokens_per_target_forward"] > 1 and sum(spec["rounds"].values()) == spec["num_target_forwards"]
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == own.outputs[0].text and len(chunks) > 3


def test_an_echoed_text_is_scored_as_it_was_when_it_was_written(client, engine) -> None:
    fields: dict[str, Any] = {"model": "tiny", "temperature": 0, "logprobs": 2, "echo": True}
    got = client.completions.create(prompt=PROMPT, max_tokens=20, extra_body={"ignore_eos": True}, **fields)
    [own] = engine.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    text, ids = got.choices[0].text, own.prompt_token_ids + list(own.outputs[0].token_ids)
    assert text == PROMPT + own.outputs[0].text
    scored = client.completions.create(prompt=ids, max_tokens=0, **fields).choices[0]
    whole, again = got.choices[0].logprobs, scored.logprobs
    assert len(again.tokens) == len(ids) and again.tokens == whole.tokens and again.text_offset == whole.text_offset
    assert again.token_logprobs[0] is whole.token_logprobs[0] is None and again.top_logprobs[0] is None
    assert again.token_logprobs[1:] == pytest.approx(whole.token_logprobs[1:], abs=1e-9)
    for one, other, logprob in zip(
        whole.top_logprobs[1:], again.top_logprobs[1:], whole.token_logprobs[1:], strict=True
    ):
        assert one == pytest.approx(other, abs=1e-9) and max(one.values()) >= logprob
    start = len(own.prompt_token_ids)  # greedy: each token of the answer was the likeliest
    for top, logprob in zip(again.top_logprobs[start:], again.token_logprobs[start:], strict=True):
        assert max(top.values()) == logprob
    chunks = list(client.completions.create(prompt=PROMPT, max_tokens=20, stream=True, **fields,
                                            extra_body={"ignore_eos": True}))  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks) == text
    streamed = [logprob for c in chunks for logprob in c.choices[0].logprobs.token_logprobs]
    assert streamed[1:] == pytest.approx(whole.token_logprobs[1:], abs=1e-9) and streamed[0] is None


def test_chat_goes_through_the_template_and_a_seed_repeats_it(client, engine) -> None:
    [own] = engine.chat(MESSAGES, SamplingParams(temperature=0.9, seed=5, max_tokens=20, n=2))
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0.9, seed=5, max_tokens=20, n=2)
    assert [c.message.content for c in got.choices] == [o.text for o in own.outputs]
    assert got.usage.prompt_tokens == len(own.prompt_token_ids)


def test_what_the_engine_refuses_is_an_error_of_the_api(client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 512)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[64])
    assert "outside the vocabulary" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"stop_token_ids": [99]})
    assert caught.value.param == "stop_token_ids"


def test_many_streams_at_once_are_neither_lost_nor_mixed(url, engine) -> None:
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=16) for seed in range(24)]
    expected = [output.outputs[0].text for output in engine.generate([PROMPT] * 24, params)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=PROMPT, seed=seed, max_tokens=16, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(24)))

    assert asyncio.run(ask()) == expected


def test_a_client_that_hangs_up_frees_its_blocks(url, engine) -> None:
    def num_aborted() -> int:
        return engine.stats()["request_success_total"].get("abort", 0)

    def is_aborted() -> bool:
        """Once more where the answer had ended by itself before the test came to hang up."""
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=WAIT_S) as response:
            next(response.iter_lines())
        wait_until(lambda: is_idle(engine))
        return num_aborted() == before + 1

    before = num_aborted()
    wait_until(is_aborted)
    text = scraped(url)
    assert "pearl:num_requests_running 0.0" in text and 'pearl:kv_cache_usage_perc{model="target"} 0.0' in text
    assert (
        "pearl:time_to_first_token_seconds_count" in text and 'request_success_total{finished_reason="abort"}' in text
    )


def test_the_server_is_ready_and_tokenises_as_the_model_does(url, engine) -> None:
    with httpx.Client(base_url=url, timeout=WAIT_S) as http:
        wait_until(lambda: http.get("/ready").json() == {"status": "ready"})
        ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
        assert ids == engine.tokenizer.encode(PROMPT)
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}


def test_a_request_is_answered_by_the_target_alone_when_it_says_so(client) -> None:
    def ask(**extra: object) -> Any:
        body = {"include_speculation": True, **extra}
        return client.completions.create(model="tiny", prompt=PROMPT, seed=3, max_tokens=30, extra_body=body)

    pearl, alone = ask(), ask(num_speculative_tokens=0)
    assert alone.choices[0].text == pearl.choices[0].text
    assert set(alone.choices[0].model_extra["pearl"]["origins"]) == {"prefill", "target"}
    assert alone.usage.model_extra["speculation"]["num_drafted"] == 0


def test_each_panel_of_the_dashboard_finds_its_metrics_and_labels_in_a_scrape(client, url) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30)
    scrape = scraped(url)
    labels: dict[str, set[str]] = {}
    samples: dict[tuple[str, str | None], float] = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
            samples[sample.name, sample.labels.get("role")] = sample.value
    for side in ("target", "draft"):
        for name in ("round_seconds", "bridge_wait_seconds"):
            count = re.search(rf'^pearl:{name}_count{{side="{side}"}} (.+)$', scrape, re.MULTILINE)
            assert count is not None and float(count[1]) > 0, (name, side)
    assert {role: samples["pearl:recoveries_total", role] for role in ("target", "draft")} == {"target": 0, "draft": 0}
    for panel in json.loads((ROOT / "docs" / "grafana.json").read_text("utf-8"))["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            names = set(re.findall(r"pearl:\w+", query))
            missing = names - labels.keys()
            assert names and not missing, (panel["title"], missing)
            grouped = ",".join(re.findall(r"by \(([^)]*)\)", query)) + "," + ",".join(re.findall(r"(\w+)=", query))
            used = set(re.findall(r"\w+", grouped)) | set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            for name in names:
                assert used <= labels[name], (panel["title"], name, used - labels[name])


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_odd_bodies_leave_no_request_no_block_and_no_memory(url, engine, count) -> None:
    coordinator = psutil.Process(engine.status()["coordinator_pid"])
    memories = [Memory(count, lambda p=p: p.memory_info().rss) for p in (psutil.Process(), coordinator)]

    def watch(number: int) -> None:
        for memory in memories:
            memory.watch(number)

    with httpx.Client(base_url=url, timeout=WAIT_S) as client:
        throw(client, count, seed=count, watch=watch)
    wait_until(lambda: is_idle(engine))
    growths = [memory.growth for memory in memories]
    print(f"{count} bodies: memory of server and coordinator grew by {growths}")
    assert count < 10_000 or max(growths) < 0.1


def test_a_drained_server_ends_its_streams_whole_or_with_a_word(ray_session, tiny_dirs, engine) -> None:
    held = deploy(config(tiny_dirs, **ROOM), "drained", detached=True)
    url = start_http_actor("drained", ServerSettings(), "127.0.0.1", 0, engine.tokenizer)
    ends: dict[str, list[dict[str, Any]]] = {}
    running = threading.Barrier(3)

    def ask(name: str, body: dict[str, Any]) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT_S) as response:
            events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            first = json.loads(next(events))
            running.wait(WAIT_S)
            ends[name] = [first, *(json.loads(event) for event in events if event != "[DONE]")]

    bodies = {"short": {**LONG, "max_tokens": 12}, "long": LONGER}
    threads = [threading.Thread(target=ask, args=item) for item in bodies.items()]
    for thread in threads:
        thread.start()
    running.wait(WAIT_S)
    server = find_http_actor("drained")
    assert server is not None
    drain_http_actor(server, 10.0)
    for thread in threads:
        thread.join(WAIT_S)
    wait_until(lambda: is_refused(url))  # by itself: its coordinator still runs
    stop_deployment(held.name)
    assert ends["short"][-1]["choices"][0]["finish_reason"] == "length"
    assert ends["long"][-1]["error"]["code"] == "shutting_down"


def test_the_server_of_a_detached_deployment_ends_with_it(ray_session, tiny_dirs, engine) -> None:
    held = deploy(config(tiny_dirs, **ROOM), "web", detached=True)
    url = start_http_actor("web", ServerSettings(served_model_names=("tiny",)), "127.0.0.1", 0, engine.tokenizer)
    [own] = engine.generate(PROMPT, GREEDY)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        got = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30)
        assert got.choices[0].text == own.outputs[0].text
    with httpx.stream("POST", f"{url}/v1/completions", json=LONGER, timeout=WAIT_S) as response:
        events = (line for line in response.iter_lines() if line.startswith("data: "))
        next(events)
        stop_deployment(held.name)
        *_, error, done = events
    assert "was stopped" in json.loads(error.removeprefix("data: "))["error"]["message"] and done == "data: [DONE]"
    wait_until(lambda: find_http_actor("web") is None and is_refused(url))
    assert ray.is_initialized()
