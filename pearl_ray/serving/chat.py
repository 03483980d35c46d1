"""``POST /v1/chat/completions``: a conversation continued. Writes OpenAI's chat completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pearl_ray.serving.answers import EventStream, Pieces, chat_logprobs, prompt_logprobs, usage_of
from pearl_ray.serving.completions import CLIENT_CLOSED_REQUEST
from pearl_ray.serving.generation import ClientGoneError, Generation, Services, unless_client_goes
from pearl_ray.serving.logs import log_fields
from pearl_ray.serving.prompts import check_against_model, encode, render_chat
from pearl_ray.serving.responses import ChatChoice, ChatCompletion
from pearl_ray.serving.schema import ChatCompletionRequest
from pearl_ray.serving.unsupported import refuse_unsupported


async def create_chat_completion(
    services: Services, request: Request, body: ChatCompletionRequest
) -> Response | ChatCompletion:
    """Answer the conversation.

    Raises:
        ApiError, PearlError: nothing was generated.
    """
    name = services.name_of(body.model)
    body.check()
    refuse_unsupported("chat", body)
    model = services.model()
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling(body.max_completion_tokens or body.max_tokens, num_logprobs)
    text = await render_chat(model.tokenizer, body.messages, body.add_generation_prompt, body.chat_template_kwargs)
    prompt = await encode(model.tokenizer, text, add_special_tokens=False)
    check_against_model(model, [prompt], params, "messages", services.settings.max_choices)
    generation = await Generation.start(services, [prompt], params, "chatcmpl", log_fields(request, user=body.user))
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

    def __init__(self, services: Services, generation: Generation, body: ChatCompletionRequest, name: str) -> None:
        self._generation, self._body, self._name = generation, body, name
        self._created = services.now()
        self._tokenizer = services.model().tokenizer

    def _pieces(self) -> Pieces:
        return Pieces(self._tokenizer, self._generation.prompts[0], self._generation.params)

    def whole(self) -> ChatCompletion:
        """The finished answer."""
        (output,) = self._generation.finished()
        body = self._body
        choices = []
        for answer in output.outputs:
            logprobs = chat_logprobs(answer.logprobs, body.top_logprobs or 0) if answer.logprobs is not None else None
            tokens = (answer.token_ids, answer.origins, answer.finish_reason, answer.stop_reason)
            choices.append(
                ChatChoice.model_validate(
                    {
                        "index": answer.index,
                        "message": {"role": "assistant", "content": answer.text},
                        "finish_reason": answer.finish_reason,
                        "stop_reason": answer.stop_reason,
                        "logprobs": logprobs,
                        "prompt_logprobs": prompt_logprobs(output),
                        "pearl": self._pieces().whole(*tokens) if body.include_speculation else None,
                    }
                )
            )
        usage = usage_of([output], bool(body.include_speculation))
        return ChatCompletion(
            id=self._generation.id, created=self._created, model=self._name, choices=choices, usage=usage
        )

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._name,
            "choices": choices,
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk per round and choice; the first of each choice names the role."""
        body = self._body
        pieces: dict[int, Pieces] = {}
        begun: set[int] = set()
        async for updates in self._generation.rounds():
            for index, update in updates:
                delta = {"content": update.text} if update.text else {}
                if index not in begun:
                    begun.add(index)
                    delta = {"role": "assistant", "content": update.text}
                choice: dict[str, Any] = {
                    "index": index,
                    "delta": delta,
                    "logprobs": None,
                    "finish_reason": update.finish_reason,
                }
                if update.finish_reason is not None:
                    choice["stop_reason"] = update.stop_reason
                if update.logprobs is not None:
                    choice["logprobs"] = chat_logprobs(update.logprobs, body.top_logprobs or 0)
                if body.include_speculation:
                    if index not in pieces:
                        pieces[index] = self._pieces()
                    choice["pearl"] = pieces[index].take(
                        update.token_ids, update.origins, update.finish_reason, update.stop_reason
                    )
                elif not delta and update.finish_reason is None and not update.logprobs:
                    continue
                yield self._chunk([choice])
        if body.wants_usage:
            usage = usage_of(self._generation.finished(), bool(body.include_speculation))
            yield {**self._chunk([]), "usage": usage.model_dump(exclude_none=True)}
