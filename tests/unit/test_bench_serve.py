"""``pearl-ray bench serve`` against the real app over a fake engine on loopback, and its arithmetic by itself."""

from __future__ import annotations

import asyncio
import json
import math
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from pearl_ray.cli import cli
from pearl_ray.commands.load import Answer, Target, Timing, body_of, send_all, send_times, share_tokens
from pearl_ray.commands.load_report import Run, is_good, parse_goodput, peaks, results
from pearl_ray.serving.settings import KeyRing
from tests.serving_fakes import WAIT_S, FakeEngine, serving, wait_until


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(delay_s=0.002)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, served_model_names=("tiny",)) as server:
        yield server.url


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"turns": ["hello there", "and then"]}, {"prompt": "count to ten"}, {"turns": ["why?"]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def bench(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, ["bench", "serve", *map(str, args)], env=env, prog_name="pearl-ray")


def measured(tmp_path: Path, *args: object) -> dict[str, object]:
    path = tmp_path / "result.json"
    result = bench(*args, "--save-result", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


@contextmanager
def held_until(engine: FakeEngine, condition: Callable[[], object]) -> Iterator[None]:
    """No answer goes on before the condition holds; a thread of its own watches for it."""

    def watch() -> None:
        try:
            wait_until(condition)
        finally:
            engine.held = False

    engine.held = True
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer it moves the clock to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(timeout and 0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """Time passes only where all sleep."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


# -- against the app --------------------------------------------------------------------------------------------------


def test_text_with_unicode_line_ends_keeps_its_events_whole(prompts, tmp_path) -> None:
    with serving(FakeEngine(text="a\u2028b\x85c\u2029"), served_model_names=("tiny",)) as server:
        found = measured(tmp_path, "--base-url", server.url, "--prompts", prompts, "--output-len", 12)
    assert found["failed"] == 0 and found["output_lens"] == [12] * 3 and {len(g) for g in found["itls"]} == {11}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_requests_and_tokens_are_counted_as_the_server_counts_them(endpoint, url, engine, prompts, tmp_path) -> None:
    with held_until(engine, lambda: len(engine.running) == 3):
        found = measured(
            tmp_path, "--base-url", f"{url}/v1", "--prompts", prompts, "--num-prompts", 7, "--output-len", 25,
            "--endpoint", endpoint, "--max-concurrency", 3, "--percentiles", "50,95",
        )  # fmt: skip
    assert (found["completed"], found["failed"], found["model_id"]) == (7, 0, "tiny")
    assert found["total_output_tokens"] == 7 * 25 and found["output_lens"] == [25] * 7
    sent = sorted(len(prompt) for prompt, _ in engine.submitted)
    assert sorted(found["input_lens"]) == sent and found["total_input_tokens"] == sum(sent)
    assert found["max_concurrent_requests"] == 3
    assert all(0 < first < end for first, end in zip(found["ttfts"], found["e2els"], strict=True))
    # Rounds of 1, 1, 3, 2, 1, … tokens: a gap less than chunks, and every token behind the first chunk has its latency.
    assert {len(gaps) for gaps in found["itls"]} == {24}
    assert all(len(icls) < 24 for icls in found["icls"])
    assert found["p95_ttft_ms"] >= found["p50_ttft_ms"] == pytest.approx(found["median_ttft_ms"])
    assert {"mean_itl_ms", "mean_icl_ms", "mean_tpot_ms", "mean_e2el_ms"} <= found.keys()
    assert all(params.temperature == 0 and params.max_tokens == 25 for _, params in engine.submitted)


def test_the_table_speaks_as_vllms_client_does(url, prompts) -> None:
    result = bench("--base-url", url, "--prompts", prompts, "--goodput", "ttft:60000", "e2el:60000")
    assert result.exit_code == 0, result.output
    for words in (
        "Successful requests", "Failed requests", "Benchmark duration (s)", "Total generated tokens",
        "Request throughput (req/s)", "Request goodput (req/s)", "Output token throughput (tok/s)", "Mean TTFT (ms)",
        "Median TPOT (ms)", "P99 ITL (ms)", "P90 ICL (ms)", "Mean E2EL (ms)",
    ):  # fmt: skip
        assert words in result.stdout, words


def test_random_prompts_have_the_length_asked_for(url, engine, tmp_path) -> None:
    found = measured(
        tmp_path, "--base-url", url, "--endpoint", "completions", "--random-input-len", 40, "--random-output-len", 9,
        "--num-prompts", 4, "--seed", 3,
    )  # fmt: skip
    assert found["input_lens"] == [40] * 4 and found["output_lens"] == [9] * 4
    assert all(params.ignore_eos for _, params in engine.submitted)
    first = sorted(prompt for prompt, _ in engine.submitted)
    assert len({tuple(prompt) for prompt in first}) == 4
    engine.submitted.clear()
    bench(
        "--base-url", url, "--endpoint", "completions", "--random-input-len", 40, "--num-prompts", 4, "--seed", 3
    )  # fmt: skip
    assert sorted(prompt for prompt, _ in engine.submitted) == first


def test_what_the_server_refuses_counts_as_failed(prompts, tmp_path) -> None:
    engine, path = FakeEngine(room=2), tmp_path / "r.json"
    with serving(engine, served_model_names=("tiny",)) as server, held_until(engine, lambda: engine.refused == 3):
        result = bench("--base-url", server.url, "--prompts", prompts, "--num-prompts", 5, "--save-result", path)
    found = json.loads(path.read_text())
    assert result.exit_code == 0 and (found["completed"], found["failed"]) == (2, 3)
    assert sum("HTTP 429" in error for error in found["errors"]) == 3
    assert "3 failed" in result.stderr and found["total_output_tokens"] == sum(
        n for n, error in zip(found["output_lens"], found["errors"], strict=True) if not error
    )


def test_a_request_that_takes_too_long_fails_and_so_does_one_never_sent(url, engine) -> None:
    engine.held = True  # no answer ever ends
    target = Target(url, "tiny", "chat")
    bodies = [body_of(target, "hi", 200, {})] * 3
    answers, _ = asyncio.run(send_all(target, bodies[:2], [0, 0], Timing(0.1)))
    assert all("no end within 0.1 s" in answer.error for answer in answers)
    for times, most in (([0, 0, 2 * WAIT_S], None), ([0, 0, 0], 2)):
        answers, _ = asyncio.run(send_all(target, bodies, times, Timing(WAIT_S, 0.3, most)))
        assert all("before it ended" in answer.error for answer in answers[:2]) and "not sent" in answers[2].error


def test_the_key_is_sent_and_written_nowhere(prompts, tmp_path) -> None:
    with serving(FakeEngine(), served_model_names=("tiny",), keys=KeyRing.of(["sk-secret"])) as server:
        args = ("--base-url", server.url, "--prompts", prompts, "--save-result", tmp_path / "r.json")
        assert_refused(bench(*args), "--base-url", "HTTP 401")
        result = bench(*args, env={"PEARL_API_KEY": "sk-secret sk-other"})
    assert result.exit_code == 0, result.output
    assert "sk-secret" not in result.output + (tmp_path / "r.json").read_text()


def test_the_picture_is_drawn(url, prompts, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert bench("--base-url", url, "--prompts", prompts, "--plot", tmp_path / "p.png").exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_done_is_told_in_one_line(url, prompts, tmp_path) -> None:
    with socket.socket() as deaf:  # its port is taken, and nobody listens there
        deaf.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        assert_refused(bench("--base-url", nobody, "--prompts", prompts), "--base-url", nobody)
        assert_refused(bench("--base-url", nobody, "--prompts", prompts, "--model", "m"), "all 3 requests failed")
    assert_refused(bench("--base-url", url), "--prompts", "--random-input-len")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--random-input-len", 3), "either")
    assert_refused(bench("--base-url", "localhost:1", "--prompts", prompts), "--base-url", "http://")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--model", "other"), "does not exist")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--request-rate", "0"), "--request-rate", "inf")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--percentiles", "50,101"), "--percentiles")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--goodput", "speed:3"), "--goodput", "speed:3")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "ttft:3"), "unexpected")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--extra-body", "[]"), "--extra-body")
    assert_refused(bench("--base-url", url, "--prompts", prompts, "--plot", tmp_path / "no" / "p.png"), "--plot")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"turns": []}\n')
    assert_refused(bench("--base-url", url, "--prompts", bad), "line 2", "turns")


def test_every_option_has_an_environment_variable_and_says_what_it_does() -> None:
    for parameter in cli.commands["bench"].commands["serve"].params:
        if isinstance(parameter, click.Option):
            assert parameter.help and all(name.startswith("PEARL_") for name in parameter.envvar or [""]), (
                parameter.name
            )


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_poisson_intervals_are_exponential_with_the_rate_asked_for() -> None:
    times = send_times(5000, 8.0, 1.0, np.random.default_rng(1))
    gaps = np.diff(times)
    assert times[0] == 0 and len(times) == 5000
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05) and gaps.std() == pytest.approx(1 / 8, rel=0.05)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 8)).pvalue > 0.01
    assert times == send_times(5000, 8.0, 1.0, np.random.default_rng(1))


def test_burstiness_sets_the_spread_and_infinite_means_fixed_intervals() -> None:
    gaps = np.diff(send_times(5000, 4.0, 4.0, np.random.default_rng(2)))
    assert gaps.mean() == pytest.approx(0.25, rel=0.05) and gaps.std() == pytest.approx(0.125, rel=0.05)
    assert send_times(4, 4.0, math.inf, np.random.default_rng(2)) == [0, 0.25, 0.5, 0.75]
    assert send_times(3, math.inf, 1.0, np.random.default_rng(2)) == [0, 0, 0]


def test_requests_are_sent_at_their_times(url) -> None:
    target = Target(url, "tiny", "completions")
    times = [0.0, 0.1, 0.2]
    answers, _ = asyncio.run(send_all(target, [body_of(target, "hi", 3, {})] * 3, times, Timing()))
    for answer, when in zip(answers, times, strict=True):
        assert answer.error is None and when <= answer.started


@pytest.mark.parametrize(("most", "started"), [(None, [0.0, 0.1, 0.2, 8.0]), (1, [0.0, 5.0, 10.0, 15.0])])
def test_a_request_waits_for_its_time_and_its_turn_and_for_nothing_else(most, started, monkeypatch) -> None:
    """By a clock that only moves while all wait."""

    async def ask(*_args: object) -> None:
        await asyncio.sleep(5.0)

    clock = SimpleNamespace(perf_counter=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr("pearl_ray.commands.load.time", clock)
    monkeypatch.setattr("pearl_ray.commands.load._ask", ask)
    target = Target("http://nowhere", "tiny", "completions")
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        timing = Timing(max_concurrency=most)
        answers, duration = runner.run(send_all(target, [{}] * 4, [0.0, 0.1, 0.2, 8.0], timing))
    assert [answer.started for answer in answers] == pytest.approx(started, abs=1e-6)
    assert duration == pytest.approx(started[-1] + 5.0, abs=1e-6)


def answer(*arrivals: float, tokens: list[int], e2e: float, error: str | None = None) -> Answer:
    total = sum(tokens)
    return Answer(0.0, list(arrivals), tokens, 10, total, e2e, error, True)


def test_tokens_that_came_together_share_their_time() -> None:
    one = answer(0.5, 0.8, 0.8, 1.4, tokens=[1, 3, 0, 2], e2e=1.5)
    assert one.ttft == 0.5 and one.inter_chunk() == pytest.approx([0.3, 0.0, 0.6])
    assert one.inter_token() == pytest.approx([0.1, 0.1, 0.1, 0.3, 0.3])
    assert one.tpot() == pytest.approx(1.0 / 5)
    assert Answer(0.0).tpot() is None and Answer(0.0).ttft is None


def test_tokens_are_dealt_by_text_and_keep_their_sum() -> None:
    assert share_tokens([4, 4, 8], 4) == [1, 1, 2]
    assert share_tokens([1, 99], 3) == [1, 2]
    assert share_tokens([3, 3], 0) == [0, 0] and share_tokens([], 5) == []
    generator = np.random.default_rng(0)
    for _ in range(200):
        chars = generator.integers(1, 12, size=generator.integers(1, 30)).tolist()
        total = int(generator.integers(0, 60))
        shares = share_tokens(chars, total)
        assert sum(shares) == total and min(shares) >= 0


def test_goodput_counts_what_keeps_every_bound() -> None:
    fast = answer(0.1, 0.2, 0.3, tokens=[1, 1, 1], e2e=0.3)  # 100 ms per token
    slow_start = answer(0.5, 0.6, 0.7, tokens=[1, 1, 1], e2e=0.7)
    slow_tokens = answer(0.1, 0.5, 0.9, tokens=[1, 1, 1], e2e=0.9)
    failed = answer(0.1, tokens=[1], e2e=0.1, error="HTTP 500")
    bounds = parse_goodput(["ttft:200", "itl:150, e2el:800"])
    assert bounds == {"ttft": 200, "itl": 150, "e2el": 800}
    assert [is_good(a, bounds) for a in (fast, slow_start, slow_tokens, failed)] == [True, False, False, False]
    assert is_good(slow_start, {"itl": 150}) and is_good(slow_tokens, {"ttft": 200})
    run = Run([fast, slow_start, slow_tokens, failed], 2.0, math.inf, 1.0, None)
    found = results(run, [50], bounds)
    assert found["request_goodput"] == 0.5 and found["request_throughput"] == 1.5 and found["failed"] == 1
    assert found["output_throughput"] == 4.5 and found["total_input_tokens"] == 30
    for bad in ("ttft", "ttft:x", "ttft:-1", "ttft:1 ttft:2", "ttft:nan"):
        with pytest.raises(ValueError, match="MILLISECONDS"):
            parse_goodput([bad])


def test_percentiles_and_peaks_are_those_of_the_samples() -> None:
    answers = [Answer(i * 0.1, [0.1 * (i + 1)], [1], 1, 1, 0.1 * (i + 1), None, True) for i in range(10)]
    found = results(Run(answers, 10.0, 5.0, math.inf, 4), [50, 90], {})
    assert found["p90_ttft_ms"] == pytest.approx(910) and found["median_ttft_ms"] == pytest.approx(550)
    assert found["burstiness"] == "inf" and "mean_itl_ms" not in found and "request_goodput" not in found
    whole = [Answer(0.0, [0.2, 1.5], [2, 3], 1, 5, 2.0), Answer(0.5, [0.4, 0.9], [1, 1], 1, 2, 1.0)]
    assert peaks(whole) == (4.0, 2)
