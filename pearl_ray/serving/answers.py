"""What answers of both kinds share: usage, log-probabilities, tokens by origin, and the SSE stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from pearl_ray.core.detokenizer import Detokenizer
from pearl_ray.core.errors import PearlError
from pearl_ray.core.outputs import Logprob, RequestOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Origin
from pearl_ray.serving.backend import Tokenizer
from pearl_ray.serving.errors import as_api_error
from pearl_ray.serving.responses import Pearl, Speculation, Usage

logger = logging.getLogger(__name__)

LOWEST = -9999.0  # JSON has no infinity; vLLM's number
PING_S = 15
SEND_TIMEOUT_S = 60.0  # a client that takes nothing for so long is gone
_encode = msgspec.json.Encoder().encode

Candidates = Sequence[Mapping[int, Logprob]]


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one stream: ``kind`` is what ``object`` says, ``created`` in seconds since 1970."""

    id: str
    kind: str
    created: int
    model: str

    def chunk(self, *choices: Mapping[str, Any]) -> dict[str, Any]:
        """One of them."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }

    def last(self, usage: Usage) -> dict[str, Any]:
        """The one behind all choices."""
        return {**self.chunk(), "usage": usage.model_dump(exclude_none=True)}


def usage_of(outputs: Sequence[RequestOutput], with_speculation: bool) -> Usage:
    """Token counts over all prompts and answers."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    speculation = speculation_of(outputs) if with_speculation else None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        speculation=speculation,
    )


def speculation_of(outputs: Sequence[RequestOutput]) -> Speculation:
    """What all prompts cost together."""
    metrics = [output.metrics for output in outputs]
    forwards = sum(m.num_target_forwards for m in metrics)
    committed = sum(m.tokens_per_target_forward * m.num_target_forwards for m in metrics)
    rounds: dict[str, int] = {}
    for m in metrics:
        for phase, count in m.rounds.items():
            rounds[phase] = rounds.get(phase, 0) + count
    return Speculation(
        num_target_forwards=forwards,
        num_drafted=sum(m.num_drafted for m in metrics),
        num_accepted=sum(m.num_accepted for m in metrics),
        tokens_per_target_forward=committed / forwards if forwards else 0.0,
        mean_run_length=sum(m.mean_run_length for m in metrics) / len(metrics) if metrics else 0.0,
        rounds=rounds,
        seeds=[output.seed for output in outputs],
    )


class Pieces:
    """An answer's text split by token, as the tokens come; the same text that the coordinator releases."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._text = Detokenizer(tokenizer.decode, prompt_ids, params.stop, min_tokens=params.min_tokens)

    def take(
        self,
        token_ids: Sequence[int],
        origins: Sequence[Origin],
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        """The extension of one chunk. A character goes to the token that completes it."""
        texts = []
        for position, token in enumerate(token_ids):
            is_end = finish_reason == "stop" and not isinstance(stop_reason, str) and position == len(token_ids) - 1
            texts.append("" if is_end or self._text.stop_reason is not None else self._text.append([token]).text)
        if finish_reason is not None and texts:
            texts[-1] += self._text.finish()
        return {"token_ids": list(token_ids), "texts": texts, "origins": list(origins)}

    def whole(self, *args: Any) -> Pearl:  # noqa: ANN401 - those of `take`
        """The extension of a whole answer."""
        return Pearl(**self.take(*args))


# -- log-probabilities ----------------------------------------------------------------------------------------------


def completion_logprobs(
    entries: Sequence[Mapping[int, Logprob] | str], num_top: int, offset: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """As the completions API writes them.

    Args:
        entries: per token its candidates, itself first, or the text of one that has no probability: a prompt's first.
        offset: characters of the tokens' texts before these.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        if isinstance(entry, str):
            text = entry
            logprobs.append(None)
            tops.append(None)
        else:
            top: dict[str, float] = {}
            for token, one in entry.items():
                written = one.decoded_token or tokenizer.decode([token], False)
                logprob = _finite(one.logprob)
                if not top:
                    text = written
                    logprobs.append(logprob)
                top[written] = max(logprob, top.get(written, logprob))  # several ids may be written alike
            tops.append(top)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops if num_top else None,
        "text_offset": offsets,
    }


def chat_logprobs(entries: Candidates, num_top: int) -> dict[str, Any]:
    """As the chat API writes them."""
    content = []
    for entry in entries:
        candidates = list(entry.values())
        best = sorted(candidates, key=lambda one: -one.logprob)[:num_top]
        content.append({**_chat_entry(candidates[0]), "top_logprobs": [_chat_entry(one) for one in best]})
    return {"content": content, "refusal": None}


def _chat_entry(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {"token": text, "logprob": _finite(one.logprob), "bytes": list(text.encode("utf-8", "replace"))}


def prompt_logprobs(output: RequestOutput) -> list[dict[str, dict[str, Any]] | None] | None:
    """vLLM's form: per prompt token, candidates by id."""
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in entry.items()
        }
        for entry in output.prompt_logprobs
    ]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


# -- streams --------------------------------------------------------------------------------------------------------


class EventStream(EventSourceResponse):
    """An SSE answer out of dictionaries, ended by ``[DONE]``; an error on the way becomes its last event.

    Args:
        chunks: one dictionary per event.
        on_end: called once, however it ends; also if the client goes before the first chunk.
    """

    def __init__(self, chunks: AsyncIterator[Mapping[str, Any]], on_end: Callable[[], None]) -> None:
        super().__init__(_events(chunks), ping=PING_S, sep="\n", send_timeout=SEND_TIMEOUT_S)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.info("a client took nothing for %g s and was dropped", SEND_TIMEOUT_S)
        finally:
            self._on_end()


async def _events(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield event(chunk)
    except Exception as error:
        told = as_api_error(error)
        if not isinstance(error, PearlError) and told is not error:
            logger.exception("a stream failed")
        yield event(told.body())
    yield b"data: [DONE]\n\n"


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event; JSON has no line breaks in it."""
    return b"data: " + _encode(content) + b"\n\n"
