"""The command line over fakes of engine, client and deployment: what it passes on, prints, and refuses in one line."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pearl_ray.cli import cli
from pearl_ray.config import FIELDS, PearlConfig
from pearl_ray.core.errors import ConfigError, DeploymentNotFoundError, ModelLoadError, PearlError, PlacementError
from pearl_ray.core.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk
from pearl_ray.core.params import SamplingParams

SHARD = {"role": "target", "rank": 0, "device": "cpu", "pid": 7, "ip": "10.0.0.1"}
ORIGINS = ["prefill", "pre_verify", "post_verify", "residual"]


def answer(prompt: object, n: int = 1) -> RequestOutput:
    """An output whose tokens are the characters of a fixed text."""
    outputs = [
        CompletionOutput(
            index=i, text="h\u00e9y!", token_ids=[104, 233, 121, 33], finish_reason="stop", origins=ORIGINS
        )
        for i in range(n)
    ]
    metrics = RequestMetrics(
        time_to_first_token_s=0.5,
        e2e_latency_s=2.0,
        num_target_forwards=2,
        tokens_per_target_forward=1.5,
        rounds={"pre_verify": 1, "post_verify": 1},
    )
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(
        request_id="r", prompt=text, prompt_token_ids=[1], outputs=outputs, finished=True, metrics=metrics, seed=9
    )


class FakeTokenizer:
    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


class FakeEngine:
    """Records what it is asked; its answers are `answer`."""

    made: list[FakeEngine] = []
    failure: Exception | None = None

    def __init__(self, config: PearlConfig | None = None, progress: Any = None) -> None:
        if FakeEngine.failure is not None:
            raise FakeEngine.failure
        self.config, self.calls, self.closed, self.name = config, [], False, ""
        self.tokenizer = FakeTokenizer()
        if progress is not None:
            progress("target", 1, 2)
        FakeEngine.made.append(self)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def generate(self, prompts: list[Any], params: SamplingParams, on_progress: Any = None) -> list[RequestOutput]:
        self.calls.append(("generate", prompts, params))
        outputs = [answer(prompt, params.n) for prompt in prompts]
        for output in outputs:
            on_progress(output)
        return outputs

    def chat(self, messages: list[dict[str, str]], params: SamplingParams) -> list[RequestOutput]:
        self.calls.append(("chat", list(messages), params))
        return [answer("p")]

    def trace(self) -> dict[str, object]:
        return {"traceEvents": []}

    def stats(self) -> dict[str, object]:
        target, draft = {1: 0.080, 8: 0.090, 16: 0.120}, {1: 0.010, 8: 0.012}
        measured = self.config is not None or self.name != "fixed"
        return {
            "target_forward_seconds": target if measured else {},
            "draft_step_seconds": draft if measured else {},
        }

    def status(self) -> dict[str, object]:
        return {"mode": "pearl", "colocate": False}

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamChunk]:
        self.calls.append(("stream", list(prompt), params))
        for i, text in enumerate("yes"):
            yield StreamChunk(request_id="r", index=0, text=text, token_ids=[i], origins=["target"])


class FakeServer:
    """The HTTP server of `serve`; its listener is a real socket on no port."""

    url = "http://fake"

    def __init__(self, settings: Any, listener: Any) -> None:
        self.settings, self.listener = settings, listener

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None: ...

    def report(self, phase: str, done: int, total: int) -> None: ...

    def begin_stop(self, drain_s: float) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def join(self) -> None: ...


class FakeCluster:
    """A Ray with deployments by name, with the functions of `pearl_ray.deployment` and the face of a Ray session."""

    def __init__(self) -> None:
        self.runs_before = True
        self.sessions = 0
        self.state: dict[str, Any] = {"state": "ready", "error": None}
        self.deployments: dict[str, PearlConfig] = {}
        self.detached: list[str] = []
        self.stopped: list[tuple[str, float]] = []
        self.servers: dict[str, str] = {}  # of detached deployments
        self.drained: list[tuple[str, float]] = []

    def open_session(self, address: str | None = None, *, start: bool = True, wanted: Any = None) -> FakeCluster:
        if not start and not self.runs_before:
            raise PearlError("no Ray cluster was found on this machine: run `ray start --head`")
        self.sessions += 1
        return self

    @property
    def started(self) -> bool:
        return not self.runs_before

    def close(self) -> None:
        self.sessions -= 1

    def deploy(self, config: PearlConfig, name: str, detached: bool, progress: Any = None) -> FakeEngine:
        self.deployments[name] = config
        if detached:
            self.detached.append(name)
        client = FakeEngine()
        client.name = name
        return client

    def deployment_status(self, name: str) -> dict[str, Any]:
        if name not in self.deployments:
            raise DeploymentNotFoundError(f"no deployment {name!r}; start it with: pearl-ray serve --name {name}")
        return {**self.state, "target": {"shards": 7}, "uptime_s": 1.23456, "shards": [SHARD]}

    def stop_deployment(self, name: str, *, timeout_s: float) -> None:
        self.deployment_status(name)
        del self.deployments[name]
        self.stopped.append((name, timeout_s))

    def drain_http_actor(self, server: str, drain_s: float) -> None:
        assert not self.stopped, "it is drained while its deployment runs"
        self.drained.append((server, drain_s))

    def list_deployments(self) -> list[str]:
        return list(self.deployments)

    def connect(self, name: str = "default", *, address: str | None = None) -> FakeEngine:
        self.deployment_status(name)
        client = FakeEngine()
        client.name = name
        return client


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    fake = FakeCluster()
    FakeEngine.made, FakeEngine.failure = [], None
    modules = {
        "engine": {"PearlEngine": FakeEngine},
        "client": {"connect": fake.connect},
        "cluster.ray_session": {"open_session": fake.open_session},
        "actors.handles": {"find_coordinator": fake.deployments.get},
        "deployment": {"deploy": fake.deploy},
        "running": {name: getattr(fake, name) for name in ("deployment_status", "stop_deployment", "list_deployments")},
    }
    modules["serving.server"] = {"HttpServer": FakeServer, "bind": lambda _host, _port: socket.socket()}
    modules["serving.http_actor"] = {"start_http_actor": lambda *_args: "http://fake"}
    modules["serving.http_handle"] = {"find_http_actor": fake.servers.get, "drain_http_actor": fake.drain_http_actor}
    monkeypatch.setattr("pearl_ray.commands.http.attach", lambda *_args: None)
    monkeypatch.setattr("pearl_ray.commands.http.target_tokenizer", lambda _config: FakeTokenizer())
    monkeypatch.setattr("pearl_ray.serving.logs.configure_logging", lambda _form: None)
    for name, content in modules.items():
        module = ModuleType(f"pearl_ray.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"pearl_ray.{name}", module)
    yield fake
    assert fake.sessions == 0, "a session was left open"


def run(*args: str, **settings: Any) -> Result:
    return CliRunner().invoke(cli, list(args), **settings)


def assert_refused(result: Result, *parts: str) -> None:
    """One line on stderr that holds these parts, exit code 2, and no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.output


# -- bad input --------------------------------------------------------------------------------------------------------

REFUSED = [
    (["generate", "hi", "--max-num-seqs", "0"], ["--max-num-seqs 0", "whole number from 1"]),
    (["generate", "hi", "--target-tp", "0"], ["--target-tp 0", "from 1"]),
    (["generate", "hi", "--target-tensor-parallel-size", "x"], ["--target-tp", "'x' is not a valid integer"]),
    (["generate", "hi", "--mode", "perl"], ["--mode", "'perl' is not one of 'pearl', 'sd', 'ar'"]),
    (["generate", "hi", "--dtype", "int4"], ["--dtype", "int4"]),
    (["generate", "hi", "--num-speculative-tokens", "65"], ["--num-speculative-tokens 65", "'auto'", "1 to 64"]),
    (["generate", "hi", "--num-speculative-tokens", "few"], ["--num-speculative-tokens", "'few'"]),
    (["generate", "hi", "--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization 1.5", "(0, 1]"]),
    (["generate", "hi", "--min-decode-share", "1"], ["--min-decode-share 1", "[0, 1)"]),
    (["generate", "hi", "--max-num-batched-tokens", "9"], ["--max-num-batched-tokens 9", "max_num_seqs"]),
    (["generate", "hi", "--cpus-per-shard", "-1"], ["--cpus-per-shard -1", "'auto'"]),
    (["generate", "hi", "--temperature", "-1"], ["--temperature -1", "[0, 100]"]),
    (["generate", "hi", "--top-p", "0"], ["--top-p 0"]),
    (["generate", "hi", "--n", "0"], ["--n 0", "1 to 64"]),
    (["generate", "hi", "--stop", ""], ["--stop", "non-empty"]),
    (["generate", "hi", "--request-seed", str(2**64)], ["--request-seed", "range"]),
    (["generate", "hi", "--taget-model", "x"], ["--taget-model", "--target-model"]),
    (["generate"], ["nothing to answer", "--prompts FILE.jsonl"]),
    (["generate", "--prompts", "/nowhere.jsonl"], ["--prompts", "/nowhere.jsonl", "does not exist"]),
    (["generate", "hi", "--output", "/nowhere/x.jsonl"], ["--output", "no directory /nowhere"]),
    (["generate", "hi", "--config", "/nowhere.yaml"], ["--config", "does not exist"]),
    (["generate", "hi", "--name", "gone"], ["'gone'", "pearl-ray serve --name gone"]),
    (["generate", "hi", "--name", "gone", "--target-tp", "2"], ["--target-tp", "--name gone leave it out"]),
    (["serve", "--mode", "fast"], ["--mode", "fast"]),
    (["serve", "--port", "70000"], ["--port", "70000"]),
    (["serve", "--api-key", "two words"], ["api_key", "not shown"]),
    (["serve", "--api-key-file", "/nowhere"], ["--api-key-file", "/nowhere"]),
    (["serve", "--shutdown-timeout", "-1"], ["--shutdown-timeout", "-1"]),
    (["serve", "--detach", "--trace", "t.json"], ["--trace", "--detach"]),
    (["serve", "--trace", "/nowhere/t.json"], ["--trace", "no directory /nowhere"]),
    (["status", "--ray-address", "local"], ["--ray-address"]),
    (["chat", "--max-tokens", "0"], ["--max-tokens 0", "from 1"]),
    (["demo", "--device", "tpu"], ["--device", "tpu"]),
    (["status", "--name", "gone"], ["'gone'"]),
    (["stop"], ["'default'"]),
    (["bench"], ["bench"]),
    (["profile", "--mode", "ar"], ["--mode ar", "no draft"]),
    (["profile", "--num-speculative-tokens", "4"], ["--num-speculative-tokens", "leave it out"]),
    (["profile", "--acceptance", "0.5,1"], ["--acceptance", "0.5,1"]),
    (["--nonsense"], ["--nonsense"]),
]


@pytest.mark.parametrize(("args", "parts"), REFUSED, ids=[" ".join(args) for args, _ in REFUSED])
def test_bad_input_gives_one_line_that_names_it_and_exit_code_2(
    cluster: FakeCluster, args: list[str], parts: list[str]
) -> None:
    assert_refused(run(*args), *parts)
    assert FakeEngine.made == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("taget_model: x", ["taget_model", "did you mean target_model"]),
        ("target-tp: seven", ["--target-tp (from the --config file)", "'seven'"]),
        ("target-tp: 1\ntarget_tensor_parallel_size: 2", ["given twice"]),
        ("- a\n- b", ["mapping"]),
        ("a: [", ["is not YAML"]),
        ("max-num-seqs: 0", ["--max-num-seqs 0"]),
    ],
)
def test_a_bad_config_file_is_refused(cluster: FakeCluster, tmp_path: Path, content: str, parts: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert_refused(run("generate", "hi", "--config", str(path)), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('"fine"\n{"prompt": ', [":2: not JSON"]),
        ("[]", [":1: wants"]),
        ('{"text": "x"}', [":1: wants"]),
        ("[1, true]", [":1: wants"]),
        ("", ["nothing to answer"]),
    ],
)
def test_a_bad_prompts_file_is_refused_with_its_line(
    cluster: FakeCluster, tmp_path: Path, content: str, parts: list[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    assert_refused(run("generate", "--prompts", str(path)), *parts)


def test_a_prompts_file_that_is_not_text_is_refused(cluster: FakeCluster, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    assert_refused(run("generate", "--prompts", str(path)), "not UTF-8")


@pytest.mark.parametrize(
    "failure",
    [
        ModelLoadError("cannot read /m/x.gguf:\nit ends early"),
        PlacementError("bundle target 3 {'GPU': 1} can't be placed; free: GPU 0"),
        ConfigError("device", "cuda", "no CUDA device can be used here; use 'cpu' or 'auto'"),
        FileNotFoundError(2, "No such file or directory", "/m/model"),
        ConnectionError("could not connect to Ray at 1.2.3.4:6379"),
    ],
)
def test_what_the_engine_refuses_is_one_line_without_a_traceback(cluster: FakeCluster, failure: Exception) -> None:
    FakeEngine.failure = failure
    assert_refused(run("generate", "hi"))


def test_an_error_that_ray_wrapped_is_told_as_itself(cluster: FakeCluster) -> None:
    wrapped = RuntimeError("ray::CoordinatorActor.start() (pid=1)\n  Traceback…")
    wrapped.cause = ModelLoadError("m.gguf is truncated")  # type: ignore[attr-defined]
    FakeEngine.failure = wrapped
    assert run("generate", "hi").stderr == "Error: m.gguf is truncated\n"


def test_debug_shows_the_traceback_before_the_line(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = logging.getLogger("pearl_ray")
    monkeypatch.setattr(ours, "level", ours.level)  # what --debug sets would last for the tests that follow
    FakeEngine.failure = ModelLoadError("m.gguf is truncated")
    for args in (["--debug", "generate", "hi"], ["generate", "hi", "--debug"]):
        result = run(*args)
        assert result.exit_code == 2
        assert result.stderr.startswith("Traceback") and result.stderr.endswith("Error: m.gguf is truncated\n")
        assert ours.level == logging.DEBUG


def test_a_fault_of_ours_is_one_line_too_with_another_exit_code(cluster: FakeCluster) -> None:
    FakeEngine.failure = KeyError("oops")
    result = run("generate", "hi")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "KeyError" in result.stderr and "--debug" in result.stderr


# -- where values come from -------------------------------------------------------------------------------------------


def config_of(*args: str, **settings: Any) -> PearlConfig:
    result = run("generate", "hi", *args, **settings)
    assert result.exit_code == 0, result.output
    return FakeEngine.made[-1].config  # type: ignore[return-value]


def test_without_options_the_config_is_the_default_one(cluster: FakeCluster) -> None:
    assert config_of() == PearlConfig()


def test_every_field_of_the_config_has_an_option_that_sets_it(cluster: FakeCluster) -> None:
    options = {
        parameter.name: parameter for parameter in cli.commands["serve"].params if isinstance(parameter, click.Option)
    }
    assert set(FIELDS) <= set(options)
    values = {
        "cpus_per_shard": "0.5",
        "num_speculative_tokens": "3",
        "trace": "t.json",
        "max_num_batched_tokens": "999",
    }
    wanted = {"cpus_per_shard": 0.5, "num_speculative_tokens": 3, "trace": "t.json", "max_num_batched_tokens": 999}
    args: list[str] = []
    for field in FIELDS:
        parameter = options[field]
        if field in values:
            args += [parameter.opts[0], values[field]]
        elif parameter.is_flag:
            wanted[field] = not getattr(PearlConfig(), field)
            args.append(parameter.opts[0] if wanted[field] else parameter.secondary_opts[0])
        elif isinstance(parameter.type, click.Choice):
            wanted[field] = parameter.type.choices[-1]
            args += [parameter.opts[0], str(wanted[field])]
        else:
            kind = {"integer": 7, "float": 0.75}.get(parameter.type.name, "m")
            wanted[field] = kind
            args += [parameter.opts[0], str(kind)]
    wanted["device"] = "cuda"  # the last choice, cpu, doesn't go with colocate
    args += ["--device", "cuda"]
    assert config_of(*args) == PearlConfig(**wanted)


def test_every_option_of_every_command_is_an_environment_variable() -> None:
    for command in cli.commands.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.envvar and all(name.startswith("PEARL_") for name in parameter.envvar), parameter.name


def test_every_option_says_what_it_does() -> None:
    for command in cli.commands.values():
        assert command.help
        assert all(p.help for p in command.params if isinstance(p, click.Option))


@pytest.mark.parametrize("name", ["PEARL_TARGET_TP", "PEARL_TARGET_TENSOR_PARALLEL_SIZE"])
def test_the_environment_sets_an_option(cluster: FakeCluster, name: str) -> None:
    assert config_of(env={name: "3"}).target_tensor_parallel_size == 3
    assert_refused(run("generate", "hi", env={name: "x"}), "--target-tp (environment variable", name)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("max-num-seqs: 1\ndraft-tp: 2\nblock_size: 4\nmode: sd\nkv-cache-blocks: null\n")
    args = ["--config", str(path), "--block-size", "8"]
    config = config_of(*args, env={"PEARL_DRAFT_TP": "3", "PEARL_BLOCK_SIZE": "2"})
    assert (config.max_num_seqs, config.draft_tensor_parallel_size, config.block_size) == (1, 3, 8)
    assert (config.mode, config.kv_cache_blocks) == ("sd", None)


def test_help_shows_units_defaults_and_environment_variables() -> None:
    text = run("serve", "--help", env={"COLUMNS": "200"}).output
    assert "Seconds that a shard waits" in text and "default: 60.0" in text and "PEARL_TARGET_TP" in text


def test_the_version_is_the_packages() -> None:
    import pearl_ray

    assert pearl_ray.__version__ in run("--version").output


# -- commands ---------------------------------------------------------------------------------------------------------


def test_generate_prints_the_answer_and_closes_its_engine(cluster: FakeCluster) -> None:
    result = run("generate", "hi", "--temperature", "0.5", "--max-tokens", "7", "--request-seed", "3", "--stop", "END")
    assert (result.exit_code, result.stdout) == (0, "h\u00e9y!\n")
    [engine] = FakeEngine.made
    params = SamplingParams(temperature=0.5, max_tokens=7, seed=3, stop=("END",))
    assert engine.calls == [("generate", ["hi"], params)] and engine.closed


def test_generate_answers_a_file_into_a_file(cluster: FakeCluster, tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('"one"\n{"prompt": "two"}\n\n{"prompt": [3, 4]}\n')
    result = run("generate", "--prompts", str(prompts), "--output", str(output))
    assert (result.exit_code, result.stdout) == (0, "")
    assert FakeEngine.made[0].calls[0][1] == ["one", "two", [3, 4]]
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two", None]
    assert lines[0]["outputs"][0]["text"] == "h\u00e9y!" and lines[0]["metrics"]["tokens_per_target_forward"] == 1.5


def test_generate_prints_json_for_each_prompt(cluster: FakeCluster) -> None:
    result = run("generate", "one", "two", "--json", "--n", "2")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(line["outputs"]) for line in lines] == [2, 2]


def test_text_that_looks_like_markup_is_printed_as_it_is(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    output = answer("p")
    object.__setattr__(output.outputs[0], "text", "x[0] = [red]")
    monkeypatch.setattr(FakeEngine, "generate", lambda *_args, **_settings: [output])
    assert run("generate", "hi").stdout == "x[0] = [red]\n"


def test_generate_asks_a_running_deployment_by_name(cluster: FakeCluster) -> None:
    cluster.deployments["prod"] = PearlConfig()
    assert run("generate", "hi", "--name", "prod").stdout == "h\u00e9y!\n"
    assert FakeEngine.made[0].config is None and FakeEngine.made[0].closed


def test_chat_keeps_the_conversation_until_it_is_reset(cluster: FakeCluster) -> None:
    result = run("chat", "--system", "Be brief.", input="hello\nand?\n/reset\nagain\n/exit\n")
    assert result.exit_code == 0 and result.stdout.count("yes") == 3
    roles = [[m["role"] for m in messages] for _, messages, _ in FakeEngine.made[0].calls]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]


def test_chat_ends_at_the_end_of_its_input(cluster: FakeCluster) -> None:
    assert run("chat", input="").exit_code == 0


def test_demo_shows_text_legend_and_a_comparison_with_the_target_alone(cluster: FakeCluster) -> None:
    result = run("demo", env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    [engine] = FakeEngine.made
    assert engine.closed and engine.calls[-2][2].num_speculative_tokens is None
    alone = engine.calls[-1][2]
    assert alone.num_speculative_tokens == 0 and alone.seed == 9
    for part in ("h\u00e9y!", "post_verify", "residual", "tokens per target forward", "1.50", "rounds in pre_verify"):
        assert part in result.stdout
    assert "speed-up" in result.stdout and "1.00×" in result.stdout


def test_demo_without_comparison_asks_no_second_time(cluster: FakeCluster) -> None:
    assert run("demo", "--no-compare").exit_code == 0
    assert len(FakeEngine.made[0].calls) == 2  # a warm-up and the answer


def test_serve_with_detach_returns_and_leaves_the_deployment(cluster: FakeCluster) -> None:
    result = run("serve", "--draft-tp", "1", "--target-tp", "7", "--detach", "--name", "a")
    assert result.exit_code == 0 and "'a' is up" in result.stdout and "pearl-ray stop --name a" in result.stdout
    assert cluster.detached == ["a"] and cluster.deployments["a"].target_tensor_parallel_size == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_holds_the_deployment_until_a_signal_then_stops_it(
    cluster: FakeCluster, tmp_path: Path, number: signal.Signals
) -> None:
    before, ended = signal.getsignal(number), threading.Event()

    def interrupt() -> None:
        while "default" not in cluster.deployments or signal.getsignal(number) is before:
            if ended.wait(0.01):
                return
        signal.raise_signal(number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    trace = tmp_path / "t.json"
    result = run("serve", "--shutdown-timeout", "5", "--trace", str(trace))
    ended.set()
    thread.join()
    assert json.loads(trace.read_text()) == {"traceEvents": []}
    assert result.exit_code == 0, result.output
    assert cluster.stopped == [("default", 5.0)] and cluster.detached == []
    assert signal.getsignal(number) is before


def test_serve_ends_with_an_error_when_the_deployment_dies(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pearl_ray.commands.serve.POLL_SECONDS", 0.01)
    cluster.state = {"state": "failed", "error": "shard target 1 died"}
    assert_refused(run("serve"), "deployment 'default' failed: shard target 1 died")
    monkeypatch.setattr(cluster, "deployments", {})
    client = FakeEngine()
    client.name = "default"
    monkeypatch.setattr(sys.modules["pearl_ray.deployment"], "deploy", lambda *_args, **_settings: client)
    assert_refused(run("serve"), "no deployment 'default'")


def test_serve_with_detach_needs_a_ray_that_runs(cluster: FakeCluster) -> None:
    cluster.runs_before = False
    assert_refused(run("serve", "--detach"), "--detach", "ray start --head")
    assert cluster.deployments == {}


def test_status_and_stop_start_no_ray(cluster: FakeCluster) -> None:
    cluster.runs_before = False
    for command in ("status", "stop"):
        assert_refused(run(command), "no Ray cluster", "ray start --head")


def test_status_shows_all_deployments_or_one(cluster: FakeCluster) -> None:
    assert "pearl-ray serve" in run("status").stdout
    cluster.deployments |= {"a": PearlConfig(), "b": PearlConfig()}
    everything = run("status").stdout
    assert (
        everything.count("ready") == 2
        and "target shard 0" in everything
        and "cpu, pid 7 on 10.0.0.1" in everything
        and "target.shards" in everything
        and "1.235" in everything
    )
    assert json.loads(run("status", "--name", "b", "--json").stdout)["target"] == {"shards": 7}


def test_stop_ends_the_named_deployment(cluster: FakeCluster) -> None:
    cluster.deployments["a"] = PearlConfig()
    result = run("stop", "--name", "a", "--shutdown-timeout", "3")
    assert result.exit_code == 0 and cluster.stopped == [("a", 3.0)] and not cluster.drained


def test_stop_drains_the_server_of_a_detached_deployment_first(cluster: FakeCluster) -> None:
    cluster.deployments["a"], cluster.servers["a"] = PearlConfig(), "server of a"
    result = run("stop", "--name", "a", "--shutdown-timeout", "3")
    assert result.exit_code == 0 and "3 s" in result.stderr
    assert cluster.drained == [("server of a", 3.0)] and cluster.stopped == [("a", 3.0)]


def test_profile_prints_costs_and_the_windows_that_follow(cluster: FakeCluster) -> None:
    result = run("profile")
    assert result.exit_code == 0 and FakeEngine.made[0].closed
    assert "80.00" in result.stdout and "12.00" in result.stdout and "0.95" in result.stdout
    found = json.loads(run("profile", "--acceptance", "0.1,0.7,0.95", "--json").stdout)
    assert found["target_forward_seconds"]["8"] == 0.09 and found["mode"] == "pearl"
    windows = {(w["sequences"], w["acceptance"]): w["window"] for w in found["windows"]}
    assert set(windows) == {(batch, rate) for batch in (1, 8) for rate in (0.1, 0.7, 0.95)}
    assert windows[1, 0.95] >= windows[1, 0.7] > 1 and windows[8, 0.1] <= windows[1, 0.1]


def test_profile_asks_a_running_deployment_that_measured_something(cluster: FakeCluster) -> None:
    cluster.deployments |= {"a": PearlConfig(), "fixed": PearlConfig()}
    assert "80.00" in run("profile", "--name", "a").stdout
    assert_refused(run("profile", "--name", "fixed"), "'fixed'", "fixed window")


def test_collect_env_shows_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret-token")
    monkeypatch.setenv("RAY_ADDRESS", "secret-host:6379")
    monkeypatch.setenv("PEARL_CACHE_DIR", str(tmp_path))
    result = run("collect-env", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["Ray auth token"] == "present" and found["RAY_ADDRESS"] == "set"
    assert {"torch", "ray", "transformers", "python", "memory"} <= set(found)
    assert "s3cret" not in result.output and "secret-host" not in result.output
