"""What a request gets back. Plain data that travels between processes; knows nothing of engines or tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pearl_ray.core.phases import Origin

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position: natural logarithm of its probability, its rank (from 1), its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One answer to a request.

    Attributes:
        index: which of the request's ``n`` answers.
        text: the generated text, without the stop string or end-of-sequence token that ended it.
        token_ids: the generated tokens, the end-of-sequence token included.
        logprobs: per token, the candidates asked for and the chosen one; None where none were asked for.
        finish_reason: "stop", "length" or "abort"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for the model's own end of sequence.
        origins: one per token, which event of the algorithm committed it (``pearl_ray.core.phases.Origin``).
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    origins: list[Origin] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestMetrics:
    """What a request cost, summed over its ``n`` answers; prefill forwards are not counted as target forwards.

    Attributes:
        time_to_first_token_s, e2e_latency_s: seconds since the request arrived; None where it had no token.
        num_target_forwards: rounds of the target that this request's sequences took part in.
        num_drafted, num_accepted: tokens that the draft made for it, and those of them that were committed.
        tokens_per_target_forward: committed tokens behind the first, by target forwards (vLLM's mean acceptance
            length); 0 where there was no forward.
        mean_run_length: mean number of tokens accepted between two rejections (the paper's MAT).
        rounds: number of rounds by phase, "pre_verify" and "post_verify".
    """

    time_to_first_token_s: float | None = None
    e2e_latency_s: float | None = None
    num_target_forwards: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    tokens_per_target_forward: float = 0.0
    mean_run_length: float = 0.0
    rounds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A request's answers so far, or all of them.

    Attributes:
        request_id: the engine's name for the request; what ``abort`` takes.
        prompt: the prompt's text; None where token ids were given.
        prompt_token_ids: the prompt as fed.
        outputs: the ``n`` answers, in order of their index.
        finished: whether all of them have ended.
        metrics: what the request cost.
        seed: the request's own seed, or the one drawn for it; with it the same answer can be had again.
        prompt_logprobs: per prompt token, None for the first; None where not asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    seed: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamChunk:
    """What one round added to one answer: the difference only.

    ``text`` may be empty while a character is incomplete or a stop string may be beginning; the last chunk has
    ``finished`` and a ``finish_reason``.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    origins: list[Origin]
    finished: bool = False
    finish_reason: FinishReason | None = None


def run_lengths(origins: Sequence[Origin]) -> list[int]:
    """Tokens accepted in each run between two rejections, the unfinished last run included; never empty.

    The mean of it is the paper's MAT (PEARL, §5.1), but for the replacement token, which is not an accepted one.

    >>> run_lengths(["prefill", "pre_verify", "post_verify", "residual", "residual", "pre_verify"])
    [2, 0, 1]
    """
    runs = [0]
    for origin in origins:
        if origin == "residual":
            runs.append(0)
        elif origin in ("pre_verify", "post_verify"):
            runs[-1] += 1
    return runs
