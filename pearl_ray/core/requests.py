"""A request and its answers as the coordinator keeps them. Knows tokens, stops and text, not blocks or rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from pearl_ray.core.detokenizer import Detokenizer
from pearl_ray.core.messages import TokenLogprobs
from pearl_ray.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, run_lengths
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Commit, Origin

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class Answer:
    """One of a request's ``n`` answers: its committed tokens and text, and what it cost.

    Attributes:
        max_total: length (prompt included) at which it ends.
        seq_id: its sequence in the batch; None while it waits.
        num_pre_verify, num_post_verify: rounds it took part in, by the phase in which it began them.
        block_hashes: of its tokens' first full cache blocks, kept here by whoever made them.
    """

    request: Request
    index: int
    max_total: int
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    seq_id: int | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    num_pre_verify: int = 0
    num_post_verify: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    _unsent_tokens: tuple[int, ...] = ()
    _unsent_origins: tuple[Origin, ...] = ()
    _unsent_text: str = ""

    @property
    def tokens(self) -> list[int]:
        """Prompt and committed output."""
        return self.request.prompt_ids + self.token_ids

    @property
    def num_target_forwards(self) -> int:
        """Rounds it took part in, prefill not counted."""
        return self.num_pre_verify + self.num_post_verify

    @property
    def rounds(self) -> dict[str, int]:
        """Those by phase, where there were any."""
        counts = {"pre_verify": self.num_pre_verify, "post_verify": self.num_post_verify}
        return {phase: count for phase, count in counts.items() if count}

    @property
    def num_tokens(self) -> int:
        """Prompt and committed output."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    def commit(self, commit: Commit, logprobs: Sequence[TokenLogprobs] = ()) -> int:
        """Take committed tokens in order, up to the first stop; what lies behind it is trimmed.

        Returns by how many tokens the answer grew.
        """
        assert self.finish_reason is None
        tokens, before = commit.tokens, len(self.token_ids)
        kept = len(tokens)
        if self.num_tokens + kept >= self.max_total or not self.request.end_ids.isdisjoint(tokens):
            kept = self._num_until_stop(tokens)
        ended = self.finish_reason == "stop"  # the token that ended it has no text
        delta = self.detokenizer.append(tokens[: kept - 1] if ended else tokens[:kept])
        self._unsent_text += delta.text
        if delta.stop_reason is not None:
            kept = delta.num_tokens_used - before
            self.finish_reason, self.stop_reason = "stop", delta.stop_reason
        elif self.finish_reason is not None:
            self._unsent_text += self.detokenizer.finish()
        tokens, origins = tokens[:kept], commit.origins[:kept]
        self.token_ids += tokens
        self.origins += origins
        self._unsent_tokens += tokens
        self._unsent_origins += origins
        if logprobs:
            self.logprobs += logprobs[:kept]
        return kept

    def _num_until_stop(self, tokens: Sequence[int]) -> int:
        """How many of these tokens remain, up to the one that ends the answer; sets the reasons if there is one."""
        params, num_output, left = self.request.params, len(self.token_ids), self.max_total - self.num_tokens
        for index, token in enumerate(tokens, 1):
            if token in self.request.end_ids and num_output + index >= params.min_tokens:
                self.finish_reason = "stop"
                self.stop_reason = token if token in params.stop_token_ids else None
                return index
            if index >= left:
                self.finish_reason = "length"
                return index
        return len(tokens)

    def abort(self) -> None:
        """End it where it is."""
        self.finish_reason = "abort"
        self._unsent_text += self.detokenizer.finish()

    def take_update(self, request_id: str) -> Update | None:
        """What came since the last call, or None."""
        tokens, text = self._unsent_tokens, self._unsent_text
        if not tokens and not text and self.finish_reason is None:
            return None
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = self.readable(self.logprobs[len(self.token_ids) - len(tokens) :])
        update = Update(
            request_id,
            self.index,
            tokens,
            self._unsent_origins,
            text,
            self.finish_reason,
            self.stop_reason,
            logprobs,
        )
        self._unsent_tokens, self._unsent_origins, self._unsent_text = (), (), ""
        return update

    def readable(self, logprobs: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
        """Per token, the candidates by id: the token itself and the likeliest."""
        return [_candidates(entry, self.request.decode) for entry in logprobs]

    def output(self) -> CompletionOutput:
        """The answer so far."""
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            origins=list(self.origins),
            logprobs=self.readable(self.logprobs) if self.request.params.logprobs is not None else None,
        )


class Update(msgspec.Struct, frozen=True, gc=False):
    """New tokens of one answer, for a stream."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    origins: tuple[Origin, ...]
    text: str
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class Request:
    """A request in the engine; times are seconds of the engine's clock.

    ``end_ids``: the tokens that end an answer, once it has ``min_tokens``.
    """

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    rejection: bool
    end_ids: frozenset[int]
    arrived: float
    decode: Callable[[list[int]], str]
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        for answer in self.answers:  # noqa: SIM110 - asked once per update: a generator costs five times as much
            if answer.finish_reason is None:
                return False
        return True

    def stop_mask(self) -> list[int]:
        """Tokens that would end an answer, which ``min_tokens`` keeps from being chosen."""
        return sorted(self.end_ids) if self.params.min_tokens else []

    def output(self) -> RequestOutput:
        """All answers so far, and the cost."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_ids),
            outputs=[answer.output() for answer in self.answers],
            finished=self.finished,
            metrics=self.metrics(),
            seed=self.seed,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Per prompt token; the first has nothing before it."""
        if self.params.prompt_logprobs is None:
            return None
        found = self.prompt_logprobs
        positions = range(1, len(self.prompt_ids))
        return [None, *(_candidates(found[i], self.decode) if i in found else None for i in positions)]

    def metrics(self) -> RequestMetrics:
        """Summed over the answers."""
        forwards = sum(a.num_target_forwards for a in self.answers)
        committed = sum(len(a.origins) - a.origins.count("prefill") for a in self.answers)
        runs = [length for a in self.answers for length in run_lengths(a.origins)]
        rounds: dict[str, int] = {}
        for answer in self.answers:
            for phase, count in answer.rounds.items():
                rounds[phase] = rounds.get(phase, 0) + count
        return RequestMetrics(
            time_to_first_token_s=None if self.first_token_at is None else self.first_token_at - self.arrived,
            e2e_latency_s=None if self.finished_at is None else self.finished_at - self.arrived,
            num_target_forwards=forwards,
            num_drafted=sum(a.num_drafted for a in self.answers),
            num_accepted=sum(a.num_accepted for a in self.answers),
            tokens_per_target_forward=committed / forwards if forwards else 0.0,
            mean_run_length=sum(runs) / len(runs) if runs else 0.0,
            rounds=rounds,
        )


def make_request(
    request_id: str,
    prompt: str | None,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    rejection: bool,
    eos_token_ids: frozenset[int],
    max_total: int,
    decode: Callable[[list[int]], str],
    now: float,
) -> Request:
    """A request with its waiting answers, which end at ``max_total`` tokens, prompt included, at the latest."""
    ids = list(prompt_ids)
    end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    request = Request(request_id, prompt, ids, params, seed, rejection, end_ids, now, decode)
    for index in range(params.n):
        detokenizer = Detokenizer(decode, ids, stop=params.stop, min_tokens=params.min_tokens)
        request.answers.append(Answer(request, index, max_total, detokenizer))
    return request


def _candidates(entry: TokenLogprobs, decode: Callable[[list[int]], str]) -> dict[int, Logprob]:
    """The token first, then the likeliest, each with its rank and text."""
    found = {entry.token: Logprob(entry.logprob, entry.rank, decode([entry.token]))}
    for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1):
        found.setdefault(token, Logprob(logprob, rank, decode([token])))
    return found
