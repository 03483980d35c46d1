"""``POST /v1/completions``: a prompt continued. Writes OpenAI's text completions, whole or in chunks.

``echo`` puts the prompt before each answer, with its log-probabilities where ``logprobs`` are asked for; with
``max_tokens: 0`` nothing else is answered (the engine still makes one token, which is dropped). A stream begins with
the prompt, whose log-probabilities the engine tells at a request's end: it gets them by a request of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pearl_ray.core.outputs import CompletionOutput, Logprob, RequestOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.requests import Update
from pearl_ray.serving.answers import Chunks, EventStream, Pieces, completion_logprobs, prompt_logprobs, usage_of
from pearl_ray.serving.generation import ClientGoneError, Generation, Services, unless_client_goes
from pearl_ray.serving.logs import log_fields
from pearl_ray.serving.prompts import check_against_model, encode_prompts, texts_of_prompts
from pearl_ray.serving.responses import Completion, CompletionChoice
from pearl_ray.serving.schema import CompletionRequest
from pearl_ray.serving.structured import blaming, of_structured_outputs
from pearl_ray.serving.unsupported import refuse_unsupported

CLIENT_CLOSED_REQUEST = 499  # nginx's number, for the log: nobody reads it
KIND = "text_completion"


async def create_completion(services: Services, request: Request, body: CompletionRequest) -> Response | Completion:
    """Answer the prompt, or each of them.

    Raises:
        ApiError, PearlError: nothing was generated.
    """
    name = services.name_of(body.model)
    body.check()
    refuse_unsupported("completion", body)
    model = services.model()
    max_tokens = 1 if body.max_tokens == 0 else body.max_tokens
    scores = body.prompt_logprobs
    if scores is None and body.echo and not (body.stream and body.max_tokens != 0):
        scores = body.logprobs
    with blaming("structured_outputs"):
        grammar = of_structured_outputs(body.structured_outputs)
        params = body.sampling(max_tokens, body.logprobs, grammar, prompt_logprobs=scores)
    prompts = await encode_prompts(model.tokenizer, body.prompt, body.add_special_tokens)
    check_against_model(model, prompts, params, "prompt", services.settings.max_choices)
    log = log_fields(request, user=body.user)
    try:
        scored, began = None, None
        if body.echo and body.logprobs is not None and scores is None:
            only = SamplingParams(max_tokens=1, prompt_logprobs=body.logprobs, num_speculative_tokens=0)
            scoring = await Generation.start(services, prompts, only, "cmpl-echo", log, is_measured=False)
            try:
                scored = await unless_client_goes(request, scoring.results())
            finally:
                scoring.close()
            began = scoring.began
        with blaming("structured_outputs"):
            generation = await Generation.start(services, prompts, params, "cmpl", log, began=began)
        writer = _Writer(services, generation, body, name, scored)
        if body.stream:
            return EventStream(writer.chunks(), generation.close)
        try:
            await unless_client_goes(request, generation.results())
            return writer.whole()
        finally:
            generation.close()
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


class _Writer:
    """One request's answer as JSON; ``scored``: where the prompts' log-probabilities are, if not in the answer."""

    def __init__(
        self,
        services: Services,
        generation: Generation,
        body: CompletionRequest,
        name: str,
        scored: Sequence[RequestOutput] | None,
    ) -> None:
        self._generation, self._body, self._scored = generation, body, scored
        self._chunks = Chunks(generation.id, KIND, services.now(), name)
        self._tokenizer = services.model().tokenizer
        self._echoes = texts_of_prompts(self._tokenizer, body.prompt) if body.echo else []

    def _pieces(self, choice: int) -> Pieces:
        params = self._generation.params
        return Pieces(self._tokenizer, self._generation.prompts[choice // params.n], params)

    def _finished(self) -> list[RequestOutput]:
        """The outputs, without what nobody asked for."""
        outputs = self._generation.finished()
        if self._body.max_tokens != 0:
            return outputs
        return [dataclasses.replace(o, outputs=[_emptied(a, self._body.logprobs) for a in o.outputs]) for o in outputs]

    def _echo(self, number: int) -> str:
        return self._echoes[number] if self._body.echo else ""

    def _prompt_entries(self, number: int, scored: RequestOutput) -> list[Mapping[int, Logprob] | str]:
        """The echoed prompt's candidates, and the text of tokens that have none."""
        if not self._body.echo:
            return []
        ids, entries = self._generation.prompts[number], scored.prompt_logprobs
        assert entries is not None
        return [e if e is not None else self._tokenizer.decode([t], False) for t, e in zip(ids, entries, strict=True)]

    def _choices(self, outputs: Sequence[RequestOutput]) -> list[CompletionChoice]:
        body = self._body
        choices: list[CompletionChoice] = []
        for number, output in enumerate(outputs):
            for answer in output.outputs:
                index, logprobs = len(choices), None
                if answer.logprobs is not None:
                    entries = [*self._prompt_entries(number, output), *answer.logprobs]
                    logprobs = completion_logprobs(entries, body.logprobs or 0, 0, self._tokenizer)
                tokens = (answer.token_ids, answer.origins, answer.finish_reason, answer.stop_reason)
                choices.append(
                    CompletionChoice.model_validate(
                        {
                            "index": index,
                            "text": self._echo(number) + answer.text,
                            "finish_reason": answer.finish_reason,
                            "stop_reason": answer.stop_reason,
                            "logprobs": logprobs,
                            "prompt_logprobs": prompt_logprobs(output) if body.prompt_logprobs is not None else None,
                            "pearl": self._pieces(index).whole(*tokens) if body.include_speculation else None,
                        }
                    )
                )
        return choices

    def whole(self) -> Completion:
        """The finished answer."""
        outputs, head = self._finished(), self._chunks
        usage = usage_of(outputs, bool(self._body.include_speculation))
        choices = self._choices(outputs)
        return Completion(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage)

    def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk per round and choice; of an echo alone one per choice. The usage last, if it is asked for."""
        return self._echoed() if self._body.max_tokens == 0 else self._rounds()

    async def _echoed(self) -> AsyncIterator[dict[str, Any]]:
        await self._generation.results()
        for choice in self._choices(self._finished()):
            yield self._chunks.chunk(choice.model_dump(exclude_none=True))
        if self._body.wants_usage:
            yield self._last()

    def _last(self) -> dict[str, Any]:
        return self._chunks.last(usage_of(self._finished(), bool(self._body.include_speculation)))

    async def _rounds(self) -> AsyncIterator[dict[str, Any]]:
        body = self._body
        pieces: dict[int, Pieces] = {}
        offsets: dict[int, int] = {}
        begun: set[int] = set()
        async for updates in self._generation.rounds():
            for index, update in updates:
                number = index // self._generation.params.n
                text = update.text
                if body.echo and index not in begun:
                    text = self._echo(number) + text
                choice: dict[str, Any] = {
                    "index": index,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": update.finish_reason,
                    "stop_reason": update.stop_reason,
                }
                if update.logprobs is not None:
                    choice["logprobs"] = self._logprobs(number, update, index not in begun, offsets.get(index, 0))
                    offsets[index] = offsets.get(index, 0) + sum(map(len, choice["logprobs"]["tokens"]))
                begun.add(index)
                if body.include_speculation:
                    if index not in pieces:
                        pieces[index] = self._pieces(index)
                    choice["pearl"] = pieces[index].take(
                        update.token_ids, update.origins, update.finish_reason, update.stop_reason
                    )
                elif not text and update.finish_reason is None and not update.logprobs:
                    continue
                yield self._chunks.chunk(choice)
        if body.wants_usage:
            yield self._last()

    def _logprobs(self, number: int, update: Update, is_first: bool, offset: int) -> dict[str, Any]:
        """Those of a chunk; the first of a choice has the echoed prompt's too."""
        entries: list[Mapping[int, Logprob] | str] = list(update.logprobs or ())
        if is_first and self._scored is not None:
            entries = self._prompt_entries(number, self._scored[number]) + entries
        return completion_logprobs(entries, self._body.logprobs or 0, offset, self._tokenizer)


def _emptied(answer: CompletionOutput, num_logprobs: int | None) -> CompletionOutput:
    """The answer to ``max_tokens: 0``."""
    logprobs: list[dict[int, Logprob]] | None = [] if num_logprobs is not None else None
    return CompletionOutput(index=answer.index, text="", token_ids=[], logprobs=logprobs, finish_reason="length")
