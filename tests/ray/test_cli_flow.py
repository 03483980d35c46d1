"""As a user types it: ray start, serve --detach, connect from another process, generate, status, stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pearl_ray import SamplingParams
from tests.local_engine import LocalEngine
from tests.ray.machine import PATIENCE_S, Machine, shared_memory, wait_for

pytestmark = pytest.mark.timeout(1200)  # a dozen processes that load torch, on two cores with others at work

PROMPT = "Once upon a time"
CONNECT = """
from pearl_ray import connect, SamplingParams
import ray
params = SamplingParams(temperature=0.0, max_tokens=24)
with connect() as client:
    out["client"] = client.generate({prompt!r}, params)[0].outputs[0].token_ids
    output = ray.get(client.coordinator.generate.remote({prompt!r}, params))
    out["handle"] = output.outputs[0].token_ids
    out["stream"] = [t for c in client.stream({prompt!r}, params) for t in c.token_ids]
    out["shards"] = [s["role"] for s in client.status()["shards"]]
"""


def pearl_ray(machine: Machine, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pearl_ray.cli", *args],
        env=machine.environment(**extra),
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
        check=False,
    )


def model_options(dirs: tuple[Path, Path]) -> list[str]:
    target, draft = map(str, dirs)
    options = ["--target-model", target, "--draft-model", draft, "--dtype", "float64", "--max-model-len", "256"]
    return [*options, "--num-speculative-tokens", "4", "--kv-cache-blocks", "64"]


@pytest.mark.parametrize("auth", ["disabled", "token"])
def test_a_detached_deployment_is_served_found_and_stopped(machine, tiny_dirs, auth):
    with LocalEngine(tiny_dirs, mode="ar") as engine:
        prompt = engine.models.tokenizer.encode(PROMPT)
        [request] = engine.generate([prompt], [SamplingParams(temperature=0.0, max_tokens=24)])
    expected = request.answers[0].token_ids
    if auth == "token":
        machine.write_token()
    machine.start_head(RAY_AUTH_MODE=auth)
    target_tp = "7" if auth == "disabled" else "1"
    served = pearl_ray(
        machine, "serve", "--draft-tp", "1", "--target-tp", target_tp, "--detach", *model_options(tiny_dirs)
    )
    assert served.returncode == 0, served.stdout + served.stderr
    out = machine.run(CONNECT.format(prompt=PROMPT))
    assert out["client"] == out["handle"] == out["stream"] == expected
    assert out["shards"] == ["draft"] + ["target"] * int(target_tp)
    status = pearl_ray(machine, "status")
    assert status.returncode == 0 and "ready" in status.stdout
    again = pearl_ray(machine, "serve", "--detach", *model_options(tiny_dirs))
    assert again.returncode == 2 and "in use" in again.stderr and "Traceback" not in again.stderr
    stopped = pearl_ray(machine, "stop")
    assert stopped.returncode == 0, stopped.stderr
    gone = pearl_ray(machine, "stop")
    assert gone.returncode == 2 and "deployment" in gone.stderr


def test_generate_answers_with_an_engine_of_its_own(machine, tiny_dirs, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"a b c"\n{"prompt": "The 3 foxes ran."}\n{"prompt": [5, 6, 7]}\n')
    trace = tmp_path / "round.trace.json"
    shared_before = shared_memory()
    files = ["--prompts", str(prompts), "--output", str(answers), "--trace", str(trace)]
    done = pearl_ray(machine, "generate", *files, "--max-tokens", "64", *model_options(tiny_dirs))
    assert done.returncode == 0, done.stderr
    outputs = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(outputs) == 3 and all(len(o["outputs"][0]["token_ids"]) <= 64 for o in outputs)
    assert outputs[2]["prompt_token_ids"] == [5, 6, 7]
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"verify 0", "draft 0"} <= names  # what the draft tells of its first round came long before the last one
    assert wait_for(lambda: shared_memory() <= shared_before), shared_memory() - shared_before
