"""Whole engines on one GPU, draft and target sharing it, with a tiny pair whose heads the kernels take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from pearl_ray import PearlConfig, PearlEngine, SamplingParams
from tests.tiny import tiny_pair

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GAP = 2.0**-5  # of the largest logit: four bfloat16 roundings
PROMPTS = ["Once upon a time", "The 3 foxes ran.", "a", "hello hello hello"]


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    sizes = {"hidden_size": 576, "head_dim": 64, "intermediate_size": 768}
    return tiny_pair(tmp_path_factory.mktemp("gpu"), **sizes)


def answers(dirs, params, **options) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(prompts, PEARL's texts, AR's texts) as token ids."""
    config = PearlConfig(
        target_model=str(dirs[0]),
        draft_model=str(dirs[1]),
        device="cuda",
        colocate=True,
        num_speculative_tokens=4,
        max_model_len=512,
        kv_cache_blocks=256,
        ray_address="local",
        **options,
    )
    with PearlEngine(config) as engine:
        pearl = engine.generate(PROMPTS, params)
        ar = engine.generate(PROMPTS, dataclasses.replace(params, num_speculative_tokens=0))
    assert sum(o.metrics.num_accepted for o in pearl) > 0
    texts = [[list(o.outputs[0].token_ids) for o in outputs] for outputs in (pearl, ar)]
    return [list(o.prompt_token_ids) for o in pearl], *texts


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_pearl_is_ar_in_float32(dirs, temperature):
    _, pearl, ar = answers(dirs, SamplingParams(temperature=temperature, seed=3, max_tokens=40), dtype="float32")
    assert pearl == ar


def test_in_bfloat16_pearl_and_ar_part_only_where_the_top_two_logits_are_within_rounding(dirs):
    prompts, pearl, ar = answers(dirs, SamplingParams(temperature=0.0, max_tokens=40), dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(dirs[0], dtype=torch.float64)
    parted = 0
    for prompt, one, other in zip(prompts, pearl, ar, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if at is None:
            assert one == other
            continue
        parted += 1
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one[:at]])).logits[0, -1]
        best = logits.topk(2).values
        assert float(best[0] - best[1]) < GAP * float(logits.abs().max()), f"token {at} is no tie"
    print(f"{parted} of {len(prompts)} texts part in bfloat16")
