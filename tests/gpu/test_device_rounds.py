"""The rounds of GPUs on a GPU, in the threads of one process: the kernels, CUDA graphs, and passes queued ahead."""

from __future__ import annotations

import gc

import pytest
import torch

from pearl_ray.actors import device_target
from pearl_ray.actors.device_target import DeviceTargetLoop
from pearl_ray.core.params import SamplingParams
from tests.distribution import Setting, exact_distribution, p_value
from tests.local_engine import LocalEngine
from tests.tiny import tiny_pair
from tests.verification_machine import counts_of, members, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = ["Once upon a time", "The 3 foxes ran.", "a", "What is it, then? No one can tell 1 from 2.", "hello hello"]
NUM_TOKENS = 64


@pytest.fixture(autouse=True)
def _no_graph_outlives_its_test():
    yield
    gc.collect()  # all graphs share torch's random state: one made in inference mode would spoil later ones


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    sizes = {"hidden_size": 576, "head_dim": 64, "intermediate_size": 768}
    return tiny_pair(tmp_path_factory.mktemp("gpu"), **sizes)


def texts(dirs, params, **options):
    """The texts, and the target's loops, ended."""
    with LocalEngine(dirs, on_device=True, device="cuda", num_blocks=256, **options) as engine:
        # All in one diff: which sequences share a pass, and so how it rounds, mustn't hang on who is faster.
        prompts = [engine.models.tokenizer.encode(text) for text in PROMPTS]
        pairs = enumerate(zip(prompts, params, strict=True))
        requests = [engine.controller.submit(f"r{i}", None, prompt, wish) for i, (prompt, wish) in pairs]
        engine.flush()
        engine.run()
    return [request.answers[0].token_ids for request in requests], engine


def wishes(temperature: float, **fields) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=temperature, seed=i, max_tokens=NUM_TOKENS, **fields) for i in range(len(PROMPTS))
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_float32_gives_the_cpus_text_in_every_mode(dirs, mode, temperature):
    with LocalEngine(dirs, mode="ar", dtype="float32") as engine:
        prompts = [engine.models.tokenizer.encode(text) for text in PROMPTS]
        expected = [r.answers[0].token_ids for r in engine.generate(prompts, wishes(temperature))]
    found, engine = texts(dirs, wishes(temperature), mode=mode, dtype="float32")
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"{mode}, temperature {temperature}: {same} of {len(expected)} texts are the CPU's")
    ar, _ = texts(dirs, wishes(temperature), mode="ar", dtype="float32")
    assert found == ar
    assert (engine.target_loops[0].num_ahead > 0) == (mode == "pearl")


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"top_p": 0.5, "min_p": 0.05}, {"verification": "rejection"}])
def test_wishes_of_all_kinds_are_answered(dirs, fields):
    found, _ = texts(dirs, wishes(1.0, **fields), dtype="float32")
    if "verification" not in fields:
        ar, _ = texts(dirs, wishes(1.0, **fields), mode="ar", dtype="float32")
        assert found == ar
    assert all(found)


KINDS = [
    {"verification": "rejection"},
    {"verification": "coupled"},
    {"verification": "rejection", "top_k": 6, "top_p": 0.75},
    {"verification": "rejection", "min_p": 0.05, "draft_temperature": 0.5},
    {"verification": "rejection", "top_p": 0.5},
]
# A row's bits are its own, however large its pass: rounds queued ahead have larger ones.
FIXED = {"dtype": "bfloat16", "attention_backend": "triton", "deterministic": True}


@pytest.mark.parametrize("kinds", [[KINDS[0]] * 5, KINDS, [{**kind, "temperature": 0.0} for kind in KINDS]])
@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_the_rejection_rule_gives_the_text_of_rounds_that_take_the_host(dirs, monkeypatch, mode, kinds):
    params = [SamplingParams(seed=i, max_tokens=NUM_TOKENS, **kind) for i, kind in enumerate(kinds)]
    found, engine = texts(dirs, params, mode=mode, **FIXED)
    [loop] = engine.target_loops
    verification = loop.verification
    assert (loop.num_ahead > 0) == (mode == "pearl") and verification.num_filled > 0
    assert verification.num_waits == verification.num_filled + verification.num_advanced
    monkeypatch.setattr(DeviceTargetLoop, "may_run_ahead", lambda self, plan: False)
    in_turn, _ = texts(dirs, params, mode=mode, **FIXED)
    assert found == in_turn
    monkeypatch.setattr(device_target, "_draws_plainly", lambda sequence: False)
    by_host, engine = texts(dirs, params, mode=mode, **FIXED)
    assert engine.target_loops[0].verification.num_filled == 0
    assert found == by_host


def test_a_round_of_the_rejection_rule_compiles_nothing(dirs, monkeypatch):
    """All kernels of a verdict, filtered and not, are compiled before the first round."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from pearl_ray.kernels import advance_kernel, filters, race, rejection

    modules = (advance_kernel, filters, race, rejection)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    for kernel in kernels:
        kernel.device_caches.clear()  # what another test of this process has compiled would hide what this one does
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda fn, **_: compiled.append(fn.name))
    with LocalEngine(dirs, on_device=True, device="cuda", num_blocks=256, **FIXED) as engine:
        engine.wait_until_up()
        assert {"_sum_block", "_test", "_accept", "_residual", "_settle", "_advance"} <= set(compiled)
        compiled.clear()
        prompts = [engine.models.tokenizer.encode(text) for text in PROMPTS]
        engine.generate(prompts, [SamplingParams(seed=i, max_tokens=32, **kind) for i, kind in enumerate(KINDS)])
        assert engine.target_loops[0].num_ahead > 0
    assert not set(compiled) & {kernel.fn.__name__ for kernel in kernels}


MACHINE = [
    (SamplingParams(temperature=1.0), True, 4),
    (SamplingParams(temperature=1.0), False, 4),
    (SamplingParams(temperature=0.5, top_k=3), True, 8),
    (SamplingParams(temperature=0.0), True, 3),
    (SamplingParams(temperature=1.5, top_k=4, top_p=0.5), True, 2),
    (SamplingParams(temperature=1.0), True, 0),
]


@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_every_verdict_is_the_hosts_on_the_same_logits(mode):
    batch, on_host = members(120, MACHINE), members(120, MACHINE)
    verification = run(batch, mode, torch.device("cuda"), num_rounds=5, with_host=True)
    assert verification.num_waits == 5 and (verification.num_advanced == 4) == (mode == "pearl")
    run(on_host, mode, torch.device("cpu"), num_rounds=5)
    assert [member.tokens for member in batch] == [member.tokens for member in on_host]


@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_the_kernels_keep_the_targets_distribution(mode):
    params = SamplingParams(temperature=1.0)
    batch = members(6000, [(params, True, width) for width in (2, 3, 4)])
    run(batch, mode, torch.device("cuda"))
    assert p_value(counts_of(batch), exact_distribution(Setting("plain", params))) > 1e-9


def test_graphs_give_what_launches_give(dirs):
    """bfloat16 under Triton's attention: the same shapes and kernels, so the same bits."""
    # Which rows share a pass is a matter of time, and so would be the rounding of a sum.
    fixed = {"dtype": "bfloat16", "attention_backend": "triton", "deterministic": True}
    eager, _ = texts(dirs, wishes(0.0), **fixed)
    graphs, engine = texts(dirs, wishes(0.0), **fixed, use_graphs=True)
    assert graphs == eager
    for parts in engine.device_parts:
        pool = parts.runner.graphs
        assert pool.num_captured > 0 and pool.num_replayed > 10 * pool.num_called, (pool.num_replayed, pool.num_called)
    assert engine.target_loops[0].num_ahead > 0
