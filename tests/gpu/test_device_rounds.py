"""The rounds of GPUs on a GPU, in the threads of one process: the kernels, CUDA graphs, and passes queued ahead."""

from __future__ import annotations

import gc

import pytest
import torch

from pearl_ray.core.params import SamplingParams
from tests.local_engine import LocalEngine
from tests.tiny import tiny_pair

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
