"""``POST /v1/chat/completions``: a conversation continued. Writes OpenAI's chat completions, whole or in chunks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pearl_ray.serving.answers import Chunks, EventStream, Pieces, chat_logprobs, prompt_logprobs, usage_of
from pearl_ray.serving.completions import CLIENT_CLOSED_REQUEST
from pearl_ray.serving.errors import ApiError
from pearl_ray.serving.generation import ClientGoneError, Generation, Services, unless_client_goes
from pearl_ray.serving.logs import log_fields
from pearl_ray.serving.prompts import check_against_model, encode, render_chat
from pearl_ray.serving.responses import ChatChoice, ChatCompletion
from pearl_ray.serving.schema import ChatCompletionRequest, Message
from pearl_ray.serving.structured import blaming, of_response_format, of_structured_outputs
from pearl_ray.serving.tool_parsers import Parsed
from pearl_ray.serving.tools import ToolUse, for_template, speaks_of_tools, tool_use
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
    use = tool_use(body, services.dialect()) if body.tools or body.tool_choice else None
    if body.structured_outputs is not None and body.response_format is not None and body.response_format.type != "text":
        message = "structured_outputs and response_format say the same; send one"
        raise ApiError(400, message, param="structured_outputs", code="invalid_value")
    with blaming("response_format"):
        format_ = of_response_format(body.response_format)
    to_blame = "structured_outputs" if body.structured_outputs else "response_format"
    if use is not None and (format_ is None or use.holds_calls):
        to_blame = "tools"
    with blaming(to_blame):
        wanted = format_ or of_structured_outputs(body.structured_outputs)
        structured = use.grammar(wanted) if use is not None else wanted
        params = body.sampling(body.max_completion_tokens or body.max_tokens, num_logprobs, structured)
    text = await chat_text(services, body.messages, use, body.add_generation_prompt, body.chat_template_kwargs)
    prompt = await encode(model.tokenizer, text, add_special_tokens=False)
    check_against_model(model, [prompt], params, "messages", services.settings.max_choices)
    with blaming(to_blame):
        generation = await Generation.start(services, [prompt], params, "chatcmpl", log_fields(request, user=body.user))
    writer = _Writer(services, generation, body, name, use)
    if body.stream:
        return EventStream(writer.chunks(), generation.close)
    try:
        await unless_client_goes(request, generation.results())
        return writer.whole()
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()


async def chat_text(
    services: Services,
    messages: Sequence[Message],
    use: ToolUse | None,
    add_generation_prompt: bool,
    template_args: Mapping[str, Any] | None,
) -> str:
    """The prompt of a conversation, and of the tools that may be called.

    Raises:
        ApiError, RequestRefusedError: the messages or the arguments can't be honoured.
    """
    with_tools = use is not None or any(map(speaks_of_tools, messages))
    dialect = services.dialect() if with_tools else None
    plain, tools = for_template(messages, use.functions if use is not None else (), dialect)
    text = await render_chat(services.model().tokenizer, plain, tools, add_generation_prompt, template_args)
    return text + (use.prompt_end if use is not None else "")


class _Reader:
    """One answer's text, parted into what is said and which tools are called."""

    def __init__(self, use: ToolUse | None) -> None:
        self._parser = use.parser() if use is not None else None
        self._most = 1 if use is not None and not use.several else None
        self._num_calls = 0

    def read(self, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """What the next piece says, the calls that it completes, and why the answer ended if it did."""
        if self._parser is None:
            return text, [], finish_reason
        parsed = self._parser.feed(text)
        if finish_reason is not None:
            last = self._parser.finish()
            parsed = Parsed(parsed.text + last.text, parsed.calls + last.calls)
        calls = []
        for call in parsed.calls:
            if self._num_calls == self._most:
                break
            function = {"name": call.name, "arguments": call.arguments}
            call_id = f"call_{uuid.uuid4().hex}"
            calls.append({"index": self._num_calls, "id": call_id, "type": "function", "function": function})
            self._num_calls += 1
        return parsed.text, calls, "tool_calls" if finish_reason == "stop" and self._num_calls else finish_reason


class _Writer:
    """One request's answer as JSON."""

    def __init__(
        self, services: Services, generation: Generation, body: ChatCompletionRequest, name: str, use: ToolUse | None
    ) -> None:
        self._generation, self._body, self._use = generation, body, use
        self._chunks = Chunks(generation.id, "chat.completion.chunk", services.now(), name)
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
            text, calls, reason = _Reader(self._use).read(answer.text, answer.finish_reason)
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            tokens = (answer.token_ids, answer.origins, answer.finish_reason, answer.stop_reason)
            choices.append(
                ChatChoice.model_validate(
                    {
                        "index": answer.index,
                        "message": message,
                        "finish_reason": reason,
                        "stop_reason": answer.stop_reason,
                        "logprobs": logprobs,
                        "prompt_logprobs": prompt_logprobs(output),
                        "pearl": self._pieces().whole(*tokens) if body.include_speculation else None,
                    }
                )
            )
        usage = usage_of([output], bool(body.include_speculation))
        head = self._chunks
        return ChatCompletion(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk per round and choice; the first of each choice names the role."""
        body = self._body
        pieces: dict[int, Pieces] = {}
        readers: dict[int, _Reader] = {}
        async for updates in self._generation.rounds():
            for index, update in updates:
                is_first = index not in readers
                text, calls, reason = readers.setdefault(index, _Reader(self._use)).read(
                    update.text, update.finish_reason
                )
                delta: dict[str, Any] = {"content": text} if text else {}
                if is_first:
                    delta = {"role": "assistant", "content": text}
                if calls:
                    delta["tool_calls"] = calls
                choice: dict[str, Any] = {
                    "index": index,
                    "delta": delta,
                    "logprobs": None,
                    "finish_reason": reason,
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
                yield self._chunks.chunk(choice)
        if body.wants_usage:
            yield self._chunks.last(usage_of(self._generation.finished(), bool(body.include_speculation)))
