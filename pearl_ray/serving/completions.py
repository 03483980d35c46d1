"""``POST /v1/completions``: a prompt continued. Writes OpenAI's text completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pearl_ray.serving.answers import EventStream, Pieces, completion_logprobs, prompt_logprobs, usage_of
from pearl_ray.serving.generation import ClientGoneError, Generation, Services, unless_client_goes
from pearl_ray.serving.logs import log_fields
from pearl_ray.serving.prompts import check_against_model, encode_prompts
from pearl_ray.serving.responses import Completion, CompletionChoice
from pearl_ray.serving.schema import CompletionRequest
from pearl_ray.serving.structured import blaming, of_structured_outputs
from pearl_ray.serving.unsupported import refuse_unsupported

CLIENT_CLOSED_REQUEST = 499  # nginx's number, for the log: nobody reads it


async def create_completion(services: Services, request: Request, body: CompletionRequest) -> Response | Completion:
    """Answer the prompt, or each of them.

    Raises:
        ApiError, PearlError: nothing was generated.
    """
    name = services.name_of(body.model)
    body.check()
    refuse_unsupported("completion", body)
    model = services.model()
    with blaming("structured_outputs"):
        params = body.sampling(body.max_tokens, body.logprobs, of_structured_outputs(body.structured_outputs))
    prompts = await encode_prompts(model.tokenizer, body.prompt, body.add_special_tokens)
    check_against_model(model, prompts, params, "prompt", services.settings.max_choices)
    with blaming("structured_outputs"):
        generation = await Generation.start(services, prompts, params, "cmpl", log_fields(request, user=body.user))
    writer = _Writer(services, generation, body, name)
    if body.stream:
        return EventStream(writer.chunks(), generation.close)
    try:
        await unless_client_goes(request, generation.results())
        return writer.whole()
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()


class _Writer:
    """One request's answer as JSON."""

    def __init__(self, services: Services, generation: Generation, body: CompletionRequest, name: str) -> None:
        self._generation, self._body, self._name = generation, body, name
        self._created = services.now()
        self._tokenizer = services.model().tokenizer

    def _pieces(self, choice: int) -> Pieces:
        params = self._generation.params
        return Pieces(self._tokenizer, self._generation.prompts[choice // params.n], params)

    def whole(self) -> Completion:
        """The finished answer."""
        outputs = self._generation.finished()
        choices: list[CompletionChoice] = []
        for output in outputs:
            for answer in output.outputs:
                index = len(choices)
                logprobs = None
                if answer.logprobs is not None:
                    logprobs = completion_logprobs(answer.logprobs, self._body.logprobs or 0, 0)
                tokens = (answer.token_ids, answer.origins, answer.finish_reason, answer.stop_reason)
                choices.append(
                    CompletionChoice.model_validate(
                        {
                            "index": index,
                            "text": answer.text,
                            "finish_reason": answer.finish_reason,
                            "stop_reason": answer.stop_reason,
                            "logprobs": logprobs,
                            "prompt_logprobs": prompt_logprobs(output),
                            "pearl": self._pieces(index).whole(*tokens) if self._body.include_speculation else None,
                        }
                    )
                )
        usage = usage_of(outputs, bool(self._body.include_speculation))
        return Completion(id=self._generation.id, created=self._created, model=self._name, choices=choices, usage=usage)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._name,
            "choices": choices,
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk per round and choice."""
        body = self._body
        pieces: dict[int, Pieces] = {}
        offsets: dict[int, int] = {}
        async for updates in self._generation.rounds():
            for index, update in updates:
                choice: dict[str, Any] = {
                    "index": index,
                    "text": update.text,
                    "logprobs": None,
                    "finish_reason": update.finish_reason,
                    "stop_reason": update.stop_reason,
                }
                if update.logprobs is not None:
                    written = completion_logprobs(update.logprobs, body.logprobs or 0, offsets.get(index, 0))
                    offsets[index] = offsets.get(index, 0) + sum(map(len, written["tokens"]))
                    choice["logprobs"] = written
                if body.include_speculation:
                    if index not in pieces:
                        pieces[index] = self._pieces(index)
                    choice["pearl"] = pieces[index].take(
                        update.token_ids, update.origins, update.finish_reason, update.stop_reason
                    )
                elif not update.text and update.finish_reason is None and not update.logprobs:
                    continue
                yield self._chunk([choice])
        if body.wants_usage:
            usage = usage_of(self._generation.finished(), bool(body.include_speculation))
            yield {**self._chunk([]), "usage": usage.model_dump(exclude_none=True)}
