"""Whether PEARL's greedy texts are AR's but for rounding: a part of ``benchmarks.hot_path``. Knows no times.

In bfloat16 a row's logits depend on what else is in its pass, so texts part where the target's top two are no further
apart than that. How far it goes is measured beside it: both modes run again with log-probabilities, and where those
texts agree the distance between the same two tokens differs by rounding alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch

from pearl_ray import PearlEngine, SamplingParams
from pearl_ray.core.outputs import Logprob, RequestOutput

MOST_ROUNDING = 1.0  # of a distance; more is a fault: bfloat16 logits below 64 then err by two units of 0.25 each
RATED = 5  # candidates per token
SLACK = 1e-3  # log-probabilities are float32, their logits multiples of a power of two


def compare(engine: PearlEngine, prompts: Sequence[list[int]], num_tokens: int) -> dict[str, object]:
    """Texts that part, each with how far PEARL's token is from AR's likeliest; printed, and counted for the report."""
    plain = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    alone = dataclasses.replace(plain, num_speculative_tokens=0)
    pearl, ar, rated_pearl, rated_ar = (
        engine.generate(list(prompts), params)
        for params in (
            plain,
            alone,
            dataclasses.replace(plain, logprobs=RATED),
            dataclasses.replace(alone, logprobs=RATED),
        )
    )
    noise = torch.tensor([d for pair in zip(rated_pearl, rated_ar, strict=True) for d in _rounding(*pair)])
    most = min(float(noise.max()), MOST_ROUNDING) if len(noise) else 0.0
    same = unexplained = agreeing = 0
    for one, other, rated in zip(pearl, ar, rated_ar, strict=True):
        at = len(_common(one, other))
        agreeing += at
        if at == len(other.outputs[0].token_ids):
            same += 1
            continue
        gap = _gap(rated, at, one)
        explained = gap is not None and gap <= most + SLACK
        unexplained += not explained
        said = (
            "not among the likeliest, or the rated run parted before"
            if gap is None
            else f"{gap:.4f} from the likeliest"
        )
        print(f"  token {at} differs: {said}{'' if explained else '  NOT EXPLAINED'}")
    print(f"correctness, batch {len(prompts)}: {same} texts equal, {len(ar) - same} part, {unexplained} unexplained")
    if len(noise):
        ninety = float(noise.quantile(0.9))
        print(
            f"  rounding moves that distance by {float(noise.max()):.4f} at most, 90 % by {ninety:.4f}, of {len(noise)}"
        )
    tested, accepted = (sum(getattr(o.metrics, name) for o in pearl) for name in ("num_drafted", "num_accepted"))
    print(f"  {accepted} of {tested} drafted tokens accepted")
    counts = {"equal": same, "parted": len(ar) - same, "unexplained": unexplained, "tokens_equal": agreeing}
    return {"batch": len(prompts), **counts, "rounding": most, "drafted": tested, "accepted": accepted}


def _common(one: RequestOutput, other: RequestOutput) -> list[int]:
    """The tokens before two texts part."""
    pairs = zip(one.outputs[0].token_ids, other.outputs[0].token_ids, strict=True)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _rounding(one: RequestOutput, other: RequestOutput) -> Iterator[float]:
    """By how much the distance of the other's top two differs, at each token before the texts part."""
    ones, others = one.outputs[0].logprobs, other.outputs[0].logprobs
    assert ones is not None and others is not None
    for found, expected in zip(ones[: len(_common(one, other))], others, strict=False):
        first, second = _top_two(expected)
        if first in found and second in found:
            distance = found[first].logprob - found[second].logprob
            yield abs(distance - (expected[first].logprob - expected[second].logprob))


def _top_two(candidates: dict[int, Logprob]) -> list[int]:
    return sorted(candidates, key=lambda token: candidates[token].logprob, reverse=True)[:2]


def _gap(rated: RequestOutput, at: int, one: RequestOutput) -> float | None:
    """How far PEARL's token at ``at`` is from the likeliest in the rated run, if that has it, and the text before."""
    logprobs = rated.outputs[0].logprobs
    token = one.outputs[0].token_ids[at]
    if logprobs is None or len(_common(rated, one)) < at or token not in logprobs[at]:
        return None
    return max(entry.logprob for entry in logprobs[at].values()) - logprobs[at][token].logprob
