"""Bodies of answers, as the API documents them. Whole answers are made of these; streamed chunks only look alike."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Speculation(BaseModel):
    """What the request cost, summed over its answers; see ``RequestMetrics``."""

    num_target_forwards: int
    num_drafted: int
    num_accepted: int
    tokens_per_target_forward: float
    mean_run_length: float = Field(description="Tokens accepted between two rejections (PEARL's MAT); of one prompt.")
    rounds: dict[str, int]
    seeds: list[int | None] = Field(description="Per prompt: with it the same answer can be had again.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    speculation: Speculation | None = None


class Pearl(BaseModel):
    """One entry per token; the texts, joined, are the answer's text."""

    token_ids: list[int]
    texts: list[str]
    origins: list[str]


class Choice(BaseModel):
    """What the choices of both APIs share."""

    index: int
    finish_reason: Literal["stop", "length", "abort", "tool_calls"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    pearl: Pearl | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null: the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None

    @model_serializer(mode="wrap")
    def _with_content(self, write: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        """An answer that only calls says so by ``content: null``, which is written where other nulls aren't. (With a
        return type, the document would show that instead of the fields.)
        """
        return {"content": None, **write(self)}


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["pearl-ray"] = "pearl-ray"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


class State(BaseModel):
    status: str
    reason: str | None = None


class Version(BaseModel):
    version: str
