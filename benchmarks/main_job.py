"""The main job, checked on the embedded pair: python -m benchmarks.main_job SECTION … --humaneval F --gsm8k F

Sections:
  equality      greedy, float32: pearl = sd = ar = Hugging Face at 1×1, batch 1 and 8
  arrangements  greedy: the same at draft TP × target TP of 1×2, 2×3, 1×7
  sampled       temperatures 0.6 and 1.0, `coupled`, seeds: pearl = sd = ar; acceptance of both rules
  replay        tokens per target forward of pearl at window 8 against a replay through `transition`, and the formula
  rounding      bfloat16, seeds: how far a text stays that of its request alone, with and without `deterministic`

A difference between two texts counts as a tie, and is printed, only where the top two scores (logit + T·g) at the
first different token lie within 1e-4 of each other. Prints a line per comparison; exit status 1 if any is not a tie.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.prompts import read_prompts
from benchmarks.reference import generate, hugging_face, teacher_forced, top_two_gap
from pearl_ray import PearlConfig, PearlEngine, RequestOutput, SamplingParams, env
from pearl_ray.core.phases import Node, Round, SequenceState, transition
from pearl_ray.core.rng import Purpose, gumbel
from pearl_ray.core.windows import pearl_tokens_per_forward
from pearl_ray.model.loading import model_path
from pearl_ray.model.tokenizer import load_tokenizer

TIE = 1e-4
Texts = list[list[int]]


def say(text: str) -> None:
    print(text, flush=True)


def answer(
    prompts: Sequence[list[int]], params: Sequence[SamplingParams], batch: int, **options: object
) -> list[RequestOutput]:
    """The outputs of an engine that decodes at most ``batch`` sequences together."""
    common = {"max_num_seqs": batch, "max_num_batched_tokens": 2048, "dtype": "float32", "device": "cpu"}
    config = PearlConfig(**{**common, **options})
    started = time.monotonic()
    with PearlEngine(config) as engine:
        up = time.monotonic() - started
        started = time.monotonic()
        if batch == 1:
            outputs = [engine.generate(prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
        else:
            outputs = engine.generate(list(prompts), list(params))
        seconds = time.monotonic() - started
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    forwards = sum(o.metrics.num_target_forwards for o in outputs)
    say(
        f"    {options} batch {batch}: {tokens} tokens in {seconds:.0f} s (up after {up:.0f} s), "
        f"{(tokens - len(outputs)) / max(forwards, 1):.3f} tokens per target forward and sequence"
    )
    return outputs


def texts_of(outputs: Sequence[RequestOutput]) -> Texts:
    return [list(o.outputs[0].token_ids) for o in outputs]


class Judge:
    """Compares texts; asks Hugging Face's model how close the call was where they differ."""

    def __init__(self, model: torch.nn.Module, prompts: Texts, params: Sequence[SamplingParams]) -> None:
        self.model, self.prompts, self.params = model, prompts, params
        self.wrong = 0

    def compare(self, name: str, found: Texts, expected: Texts) -> None:
        ties, wrong, tokens = 0, 0, 0
        for prompt, params, ours, theirs in zip(self.prompts, self.params, found, expected, strict=True):
            tokens += len(theirs)
            if ours == theirs:
                continue
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            gap = float("inf")
            if at is not None:
                logits = teacher_forced(self.model, prompt, theirs[: at + 1])[-1]
                gap = top_two_gap(logits, params, len(prompt) + at)
            say(f"    {name}: texts differ at token {at}, top two scores {gap:.2e} apart")
            ties, wrong = ties + (gap <= TIE), wrong + (gap > TIE)
        self.wrong += wrong
        say(f"  {name}: {len(found)} texts, {tokens} tokens, {ties} ties, {wrong} differences")


def greedy(count: int, tokens: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=0.0, max_tokens=tokens)] * count


def equality(prompts: Texts, model: torch.nn.Module) -> int:
    params = greedy(len(prompts), 64)
    judge = Judge(model, prompts, params)
    started = time.monotonic()
    expected = [generate(model, prompt, 64) for prompt in prompts]
    say(f"    Hugging Face: {sum(map(len, expected))} tokens in {time.monotonic() - started:.0f} s")
    for batch in (8, 1):
        for mode in ("ar", "sd", "pearl"):
            found = answer(prompts, params, batch, mode=mode, num_speculative_tokens=4)
            judge.compare(f"{mode} = Hugging Face, batch {batch}", texts_of(found), expected)
    return judge.wrong


def arrangements(prompts: Texts, model: torch.nn.Module) -> int:
    params = greedy(len(prompts), 32)
    judge = Judge(model, prompts, params)
    expected = [generate(model, prompt, 32) for prompt in prompts]
    for draft_tp, target_tp in ((1, 2), (2, 3), (1, 7)):
        for mode in ("ar", "sd", "pearl"):
            found = answer(
                prompts,
                params,
                4,
                mode=mode,
                num_speculative_tokens=4,
                draft_tensor_parallel_size=draft_tp,
                target_tensor_parallel_size=target_tp,
            )
            judge.compare(f"{mode} = Hugging Face, {draft_tp}×{target_tp}", texts_of(found), expected)
    return judge.wrong


def sampled(prompts: Texts, model: torch.nn.Module) -> int:
    wrong = 0
    for temperature in (0.6, 1.0):
        params = [SamplingParams(temperature=temperature, max_tokens=64, seed=1000 + i) for i in range(len(prompts))]
        judge = Judge(model, prompts, params)
        ar = texts_of(answer(prompts, params, 8, mode="ar"))
        for mode in ("sd", "pearl"):
            outputs = answer(prompts, params, 8, mode=mode, num_speculative_tokens=4)
            judge.compare(f"{mode} = ar, coupled, temperature {temperature}", texts_of(outputs), ar)
        say(f"  acceptance at temperature {temperature}, coupled: {acceptance(outputs):.3f}")
        expected = expected_acceptance(prompts, params, ar, model)
        say(f"    teacher-forced on the same texts: coupled {expected[0]:.3f}, rejection {expected[1]:.3f}")
        other = answer(prompts, params, 8, mode="pearl", num_speculative_tokens=4, verification="rejection")
        say(f"  acceptance at temperature {temperature}, rejection: {acceptance(other):.3f}")
        wrong += judge.wrong
    return wrong


def rounding(prompts: Texts) -> int:
    """Nothing here is wrong: bfloat16 rounds differently in another batch, unless it is told not to."""
    params = [SamplingParams(temperature=0.6, max_tokens=64, seed=1000 + i) for i in range(len(prompts))]
    for deterministic in (False, True):
        # A CPU without bfloat16 units takes many seconds for a prompt.
        options = {"dtype": "bfloat16", "deterministic": deterministic, "round_timeout_s": 600.0}
        alone = texts_of(answer(prompts, params, 1, mode="ar", **options))
        for mode in ("ar", "pearl"):
            found = texts_of(answer(prompts, params, 8, mode=mode, num_speculative_tokens=4, **options))
            kept = [
                next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
                for ours, theirs in zip(found, alone, strict=True)
            ]
            same = sum(ours == theirs for ours, theirs in zip(found, alone, strict=True))
            total = sum(map(len, alone))
            say(
                f"  deterministic {deterministic}: {mode} in a batch = ar alone in {same} of {len(found)} texts, "
                f"{sum(kept)} of {total} tokens before texts part"
            )
    return 0


def acceptance(outputs: Sequence[RequestOutput]) -> float:
    """Accepted of tested tokens; in PEARL every committed position behind the first was tested exactly once."""
    origins = [o for output in outputs for o in output.outputs[0].origins if o != "prefill"]
    return 1 - origins.count("residual") / len(origins)


def expected_acceptance(
    prompts: Texts, params: Sequence[SamplingParams], texts: Texts, model: torch.nn.Module
) -> tuple[float, float]:
    """Of both rules on given texts, by Hugging Face: the draft's keyed choice is right; the mean of Σ min(p, q)."""
    draft = hugging_face("draft", None, None)
    right, overlap, positions = 0, 0.0, 0
    for prompt, param, text in zip(prompts, params, texts, strict=True):
        p_logits = teacher_forced(model, prompt, text)[1:]
        q_logits = teacher_forced(draft, prompt, text)[1:]
        count, size = q_logits.shape
        places = [len(prompt) + 1 + i for i in range(count)]
        noise = gumbel([param.seed or 0] * count, places, [0] * count, Purpose.COUPLED, vocab_start=0, vocab_size=size)
        chosen = (q_logits + param.temperature * noise).argmax(-1).tolist()
        right += sum(a == b for a, b in zip(chosen, text[1:], strict=True))
        p, q = ((logits / param.temperature).softmax(-1) for logits in (p_logits, q_logits))
        overlap += float(torch.minimum(p, q).sum())
        positions += count
    return right / positions, overlap / positions


def replay(prompts: Texts, model: torch.nn.Module) -> int:
    """The engine's forwards against those of `transition` fed with who agrees where, read off two other models."""
    outputs = answer(prompts, greedy(len(prompts), 64), 1, mode="pearl", num_speculative_tokens=8)
    draft = hugging_face("draft", None, None)
    engine = forwards = committed = agreed = positions = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        text = list(output.outputs[0].token_ids)
        target_ids = teacher_forced(model, prompt, text).argmax(-1).tolist()
        agrees = [a == b for a, b in zip(teacher_forced(draft, prompt, text).argmax(-1).tolist(), text, strict=True)]
        assert target_ids == text, "the text isn't Hugging Face's own greedy text"
        engine += output.metrics.num_target_forwards
        forwards += replayed_forwards(len(prompt), agrees, window=8)
        committed += len(text) - 1
        agreed, positions = agreed + sum(agrees[1:]), positions + len(agrees) - 1
    alpha = agreed / positions
    formula = pearl_tokens_per_forward(alpha, 8)
    measured = committed / engine
    say(f"  agreement {alpha:.4f} over {positions} positions")
    say(f"  tokens per target forward: engine {measured:.4f} ({engine} forwards), replay {committed / forwards:.4f}")
    say(f"  closed form {formula:.4f}, measured / closed form {measured / formula:.3f}")
    return int(engine != forwards) + int(abs(measured / formula - 1) > 0.1)


def replayed_forwards(num_prompt: int, agrees: Sequence[bool], *, window: int) -> int:
    """Target forwards that `transition` takes to commit a text, given at which output positions the draft is right."""
    total = num_prompt + len(agrees)
    state = SequenceState(num_prompt, num_prompt + 1, total, window, target_kv=num_prompt, draft_kv=num_prompt)
    forwards = 0
    while state.num_committed < total:
        base = state.num_committed + len(state.pending)
        drafted = (Node(0),) * min(window, total - base)
        rows = min(len(state.pending) + 1, total - state.num_committed)
        tested = min(len(state.pending) + len(drafted), rows)
        right = [agrees[state.num_committed - num_prompt + i] for i in range(tested)]
        accepted = right.index(False) if False in right else tested
        token = 0 if accepted < rows else -1
        fed = base - state.draft_kv if drafted else 0
        state, _ = transition(state, Round(rows, fed, drafted, tested, accepted, token))
        forwards += 1
    return forwards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=("equality", "arrangements", "sampled", "replay", "rounding"))
    parser.add_argument("--humaneval", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    say(f"commit {commit}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads here")
    tokenizer = load_tokenizer(model_path("target", None, str(env.cache_dir())))
    humaneval = read_prompts(args.humaneval, 20, tokenizer)
    gsm8k = read_prompts(args.gsm8k, 20, tokenizer)
    torch.set_num_threads(1)
    model = hugging_face("target", None, None)
    wrong = 0
    for section in args.sections:
        say(f"{section}:")
        if section == "equality":
            wrong += equality(humaneval + gsm8k, model)
        elif section == "arrangements":
            wrong += arrangements(humaneval[:2] + gsm8k[:2], model)
        elif section == "sampled":
            wrong += sampled(humaneval[:4] + gsm8k[:4], model)
        elif section == "rounding":
            wrong += rounding(humaneval[:4] + gsm8k[:4])
        else:
            wrong += replay(humaneval, model)
    say("all texts are the target's" if not wrong else f"{wrong} FAILED")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
