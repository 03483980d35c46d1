"""PEARL = SD = AR = Hugging Face, token for token, on the tiny pair in float64: no exception is excused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pearl_ray.core.params import SamplingParams
from tests.local_engine import LocalEngine

pytestmark = pytest.mark.timeout(1200)  # minutes on a loaded machine

PROMPTS = [
    "Once upon a time",
    "The 3 foxes ran.",
    "a",
    "What is it, then? No one can tell 1 from 2.",
    "hello hello hello",
]
ARRANGEMENTS = [(1, 1), (1, 2), (2, 3), (1, 7), (9, 9)]
NUM_TOKENS = 40

Dirs = tuple[Path, Path]


@pytest.fixture(scope="module")
def prompts(tiny_dirs: Dirs) -> list[list[int]]:
    with LocalEngine(tiny_dirs, mode="ar") as engine:
        return [engine.models.tokenizer.encode(text) for text in PROMPTS]


def answers(dirs: Dirs, prompts: list[list[int]], params: list[SamplingParams], **options: object) -> list[list[int]]:
    with LocalEngine(dirs, **options) as engine:
        requests = engine.generate(prompts, params)
        assert all(pool.num_free == pool.num_blocks for pool in engine.pools)
        return [request.answers[0].token_ids for request in requests]


def greedy(count: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)] * count


def sampled(temperature: float, count: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS, seed=100 + i) for i in range(count)]


@pytest.fixture(scope="module")
def hugging_face(tiny_dirs: Dirs, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_dirs[0], dtype=torch.float64)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS)
        texts.append(output[0, len(prompt) :].tolist())
    return texts


@pytest.mark.parametrize("mode", ["pearl", "sd", "ar"])
@pytest.mark.parametrize(("draft_tp", "target_tp"), ARRANGEMENTS)
def test_greedy_text_is_hugging_faces_in_every_mode_and_arrangement(
    tiny_dirs, prompts, hugging_face, mode, draft_tp, target_tp
):
    found = answers(tiny_dirs, prompts, greedy(5), mode=mode, draft_tp=draft_tp, target_tp=target_tp)
    assert found == hugging_face


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("mode", ["pearl", "sd"])
def test_the_window_doesnt_change_the_text(tiny_dirs, prompts, hugging_face, mode, window):
    assert answers(tiny_dirs, prompts, greedy(5), mode=mode, window=window) == hugging_face


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_a_seed_gives_the_same_text_in_every_mode_batch_and_arrangement(tiny_dirs, prompts, temperature):
    params = sampled(temperature, 5)
    expected = answers(tiny_dirs, prompts, params, mode="ar")
    assert len({tuple(text) for text in expected}) == 5
    for mode in ("pearl", "sd"):
        assert answers(tiny_dirs, prompts, params, mode=mode) == expected
        assert answers(tiny_dirs, prompts, params, mode=mode, draft_tp=2, target_tp=3) == expected
    one_by_one = [answers(tiny_dirs, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    assert one_by_one == expected


def test_greedy_and_sampled_requests_of_both_rules_share_a_batch(tiny_dirs, prompts, hugging_face):
    params = [
        SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
        SamplingParams(temperature=0.9, max_tokens=NUM_TOKENS, seed=5),
        SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, verification="rejection"),
        SamplingParams(temperature=0.8, max_tokens=NUM_TOKENS, seed=6, verification="rejection"),
        SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.02, max_tokens=NUM_TOKENS, seed=7),
    ]
    found = answers(tiny_dirs, prompts, params, target_tp=2)
    assert found[0] == hugging_face[0] and found[2] == hugging_face[2]
    alone = [answers(tiny_dirs, [p], [s], target_tp=2)[0] for p, s in zip(prompts, params, strict=True)]
    assert found == alone
    ar = answers(tiny_dirs, prompts, params, mode="ar")
    assert [ar[i] for i in (0, 1, 2, 4)] == [found[i] for i in (0, 1, 2, 4)]


def test_preemption_doesnt_change_the_text(tiny_dirs, prompts):
    """Two sequences fit when they join, and not when they have grown."""
    params = [SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)] * len(prompts)
    expected = answers(tiny_dirs, prompts, params, mode="ar")
    with LocalEngine(tiny_dirs, num_blocks=24, block_size=4, max_num_batched_tokens=16) as engine:
        found = [r.answers[0].token_ids for r in engine.generate(prompts, params)]
        assert engine.controller.statistics.preemptions > 0
    assert found == expected


@pytest.mark.parametrize(("dtype", "num_tokens"), [("float32", 16), ("bfloat16", 80)])
def test_deterministic_gives_a_request_the_same_bits_alone_and_in_any_batch(tiny_dirs, prompts, dtype, num_tokens):
    params = SamplingParams(temperature=0.9, max_tokens=num_tokens, seed=4, logprobs=2, ignore_eos=True)

    def rated(batch: list[list[int]], **options: object) -> tuple[list[int], list[object]]:
        with LocalEngine(tiny_dirs, dtype=dtype, deterministic=True, num_blocks=128, **options) as engine:
            answer = engine.generate(batch, [params] * len(batch))[0].answers[0]
            return answer.token_ids, answer.logprobs

    alone = rated(prompts[:1], mode="ar")
    assert rated(prompts, mode="ar") == alone
    assert rated(prompts) == alone
    assert rated(prompts, window=7, max_num_batched_tokens=16, on_device=True) == alone


def test_acceptance_on_the_tiny_pair_is_what_makes_speculation_pay(tiny_dirs, prompts):
    with LocalEngine(tiny_dirs, window=4) as engine:
        requests = engine.generate(prompts, greedy(5))
    forwards = sum(r.answers[0].num_target_forwards for r in requests)
    committed = sum(len(r.answers[0].token_ids) - 1 for r in requests)
    assert committed / forwards > 1.5


@pytest.mark.parametrize("mode", ["pearl", "sd", "ar"])
@pytest.mark.parametrize("target_tp", [1, 3])
def test_logprobs_are_those_of_a_teacher_forced_pass(tiny_dirs, prompts, mode, target_tp):
    params = [
        SamplingParams(temperature=0.8, presence_penalty=0.5, seed=4, max_tokens=20, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=12, logprobs=0),
        SamplingParams(temperature=0.0, max_tokens=12),
    ]
    with LocalEngine(tiny_dirs, mode=mode, target_tp=target_tp, max_num_batched_tokens=16) as engine:
        requests = engine.generate(prompts[:3], params)
    outputs = [request.output() for request in requests]
    assert outputs[2].outputs[0].logprobs is None and outputs[1].prompt_logprobs is None
    assert all(len(candidates) == 1 for candidates in outputs[1].outputs[0].logprobs)
    model = AutoModelForCausalLM.from_pretrained(tiny_dirs[0], dtype=torch.float64)
    first, tokens = outputs[0], outputs[0].outputs[0].token_ids
    ids = torch.tensor([prompts[0] + tokens])
    expected = model(ids).logits[0].log_softmax(-1)
    assert first.prompt_logprobs[0] is None
    given = [*first.prompt_logprobs[1:], *first.outputs[0].logprobs]
    assert len(given) == ids.shape[1] - 1
    for position, candidates in enumerate(given):
        token = int(ids[0, position + 1])
        row = expected[position]
        assert candidates[token].rank == int((row > row[token]).sum()) + 1
        top = row.topk(2 if position + 1 < len(prompts[0]) else 3).indices.tolist()
        assert set(candidates) == {token, *top}
        for candidate, logprob in candidates.items():
            assert logprob.logprob == pytest.approx(float(row[candidate]), abs=1e-4)
