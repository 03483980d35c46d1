"""nano-PEARL's scripts over a fake engine: the calls of its example.py and bench.py, and what they get back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from pearl_ray.compat.nano_pearl import PEARLConfig, PEARLEngine, SamplingParams, logger
from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import ConfigError
from pearl_ray.core.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk

ORIGINS = ["prefill", "pre_verify", "post_verify", "post_verify", "residual", "pre_verify"]


class FakeTokenizer:
    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        return f"<user>{messages[0]['content']}"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "a chat prompt holds its special tokens already"
        return [ord(c) for c in text]


class FakeEngine:
    """Answers every prompt with six tokens; a stream never ends by itself."""

    made: list[FakeEngine] = []

    def __init__(self, config: PearlConfig) -> None:
        self.config, self.tokenizer = config, FakeTokenizer()
        self.calls: list[tuple[Any, Any]] = []
        self.aborted: list[str] = []
        self.closed = False
        FakeEngine.made.append(self)

    def generate(self, prompts: list[list[int]], params: Sequence[Any]) -> list[RequestOutput]:
        assert not self.closed
        self.calls.append((prompts, params))
        return [self._output(prompt) for prompt in prompts]

    def _output(self, prompt: list[int]) -> RequestOutput:
        text = f"answer to {len(prompt)} tokens"
        first = CompletionOutput(index=0, text=text, token_ids=list(range(6)), finish_reason="length", origins=ORIGINS)
        return RequestOutput(
            request_id="r",
            prompt=None,
            prompt_token_ids=prompt,
            outputs=[first],
            finished=True,
            metrics=RequestMetrics(),
        )

    def stream(self, prompt: list[int], params: Any) -> Iterator[StreamChunk]:
        self.calls.append((prompt, params))
        request_id = f"r{prompt[0]}"
        yield StreamChunk(request_id=request_id, index=0, text="a", token_ids=[1], origins=["prefill"])
        while True:
            chunk = {"text": "bc", "token_ids": [2, 3], "origins": ["pre_verify", "residual"]}
            yield StreamChunk(request_id=request_id, index=0, **chunk)

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    FakeEngine.made = []
    module = ModuleType("pearl_ray.engine")
    vars(module)["PearlEngine"] = FakeEngine
    monkeypatch.setitem(sys.modules, "pearl_ray.engine", module)
    yield FakeEngine.made


def example_config() -> PEARLConfig:
    return PEARLConfig(
        "/models/draft",
        "/models/target",
        draft_tensor_parallel_size=1,
        target_tensor_parallel_size=1,
        gpu_memory_utilization=0.9,
    )


def test_the_calls_of_example_py_work(engines: list[FakeEngine]) -> None:
    engine = PEARLEngine(example_config())
    engine.add_request("Hi", SamplingParams(temperature=0.0, max_tokens=256, ignore_eos=False))
    output_text, num_tokens, num_acc_tokens, elapsed_time = engine.generate()
    assert output_text == ["answer to 8 tokens"] and num_tokens == [6]
    assert num_acc_tokens == [[4, 1]] and sum(num_acc_tokens[0]) / len(num_acc_tokens[0]) == 2.5
    assert isinstance(elapsed_time, float) and elapsed_time > 0
    [made] = engines
    assert (made.config.draft_model, made.config.target_model, made.config.mode) == (
        "/models/draft",
        "/models/target",
        "pearl",
    )
    prompts, [params] = made.calls[0]
    assert prompts == [[ord(c) for c in "<user>Hi"]]
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, 256, False)
    engine.exit()
    assert made.closed


def test_the_calls_of_bench_py_work_in_the_order_of_the_requests(engines: list[FakeEngine]) -> None:
    engine = PEARLEngine(example_config())
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=20)
    for prompt in ([1, 2], [3], [4, 5, 6]):
        engine.add_request(prompt, copy.deepcopy(params))
    texts, num_tokens, num_acc_tokens, _ = engine.generate()
    assert texts == ["answer to 2 tokens", "answer to 1 tokens", "answer to 3 tokens"]
    assert [sum(n) / len(n) for n in num_acc_tokens or []] == [2.5] * 3 and sum(num_tokens) == 18
    engine.add_request([7], params)
    texts, num_tokens, nothing, elapsed = engine.AR_generate()
    assert (texts, num_tokens, nothing) == (["answer to 1 tokens"], [6], None) and elapsed > 0
    [made] = engines
    assert [call[1][0].num_speculative_tokens for call in made.calls] == [None, 0]
    engine.exit()


def test_requests_are_answered_once(engines: list[FakeEngine]) -> None:
    engine = PEARLEngine(example_config())
    engine.add_request([1], SamplingParams())
    engine.generate()
    engine.add_request([2], SamplingParams())
    engine.generate()
    assert [prompts for prompts, _ in engines[0].calls] == [[[1]], [[2]]]
    engine.exit()


def test_bench_generate_runs_so_many_rounds_past_any_end(engines: list[FakeEngine]) -> None:
    engine = PEARLEngine(example_config())
    for prompt in ([1], [2]):
        engine.add_request(prompt, SamplingParams(max_tokens=3))
    texts, num_tokens, num_acc_tokens, _ = engine.bench_generate(num_pearl_steps=4)
    assert texts == ["a" + "bc" * 4] * 2 and num_tokens == [9, 9]
    assert num_acc_tokens == [[2, 2, 2, 2, 0]] * 2
    assert sorted(engines[0].aborted) == ["r1", "r2"]
    assert all(params.ignore_eos and params.max_tokens is None for _, params in engines[0].calls)
    engine.exit()


def test_bad_values_are_refused_when_the_objects_are_made(engines: list[FakeEngine]) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        SamplingParams(temperature=-1.0)
    with pytest.raises(ConfigError, match="num_speculative_tokens=0"):
        PEARLConfig("d", "t", gamma=0)
    engine = PEARLEngine(PEARLConfig("d", "t", gamma=5, num_kvcache_blocks=10))
    assert (engines[0].config.num_speculative_tokens, engines[0].config.kv_cache_blocks) == (5, 10)
    with pytest.raises(ConfigError, match="num_pearl_steps=0"):
        engine.bench_generate(0)
    engine.exit()


def test_the_defaults_are_nano_pearls(engines: list[FakeEngine]) -> None:
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=False)
    config = PEARLConfig("d", "t").to_pearl()
    assert (config.draft_tensor_parallel_size, config.target_tensor_parallel_size) == (2, 2)


def test_the_logger_takes_a_color_and_prints_brackets_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger.handlers[0], "console", Console(file=sys.stdout, width=100))
    logger.info("[PEARL Generate] a[0]", color="yellow")
    logger.info("plain %d", 3)
    printed = capsys.readouterr().out
    assert "[PEARL Generate] a[0]" in printed and "plain 3" in printed and "yellow" not in printed
