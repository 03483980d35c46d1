"""Bodies of requests, field by field as OpenAI's and vLLM's. Types and bounds; what they mean is decided elsewhere.

Every model forbids unknown fields. Fields that the engine doesn't honour yet stand in ``unsupported.NOT_HONOURED``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pearl_ray.core.params import SamplingParams, StructuredOutputsParams, Verification
from pearl_ray.serving.errors import ApiError

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_IDS = 1024  # of stop_token_ids and logit_bias
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """Base of all bodies: unknown fields are refused, and nothing is converted (no "3" for 3)."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False


class StructuredOutputs(Body):
    """vLLM's: exactly one of them."""

    json_: str | dict[str, Any] | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=MAX_IDS)] | None = None
    grammar: str | None = Field(None, description="In Lark's syntax, as llguidance reads it.")


class SamplingFields(Body):
    """What both ways of generating share."""

    model: str | None = Field(None, description="One of /v1/models; the first of them if left out.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: int | None = Field(1, ge=1, le=64)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_IDS)] | None = None
    user: str | None = Field(None, max_length=256, description="Written to the request's log line.")
    # vLLM's
    top_k: int | None = Field(0, ge=-1, lt=2**31)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=100)
    min_tokens: int | None = Field(0, ge=0, lt=2**31)
    ignore_eos: bool | None = False
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_IDS)] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    structured_outputs: StructuredOutputs | None = None
    # ours
    include_speculation: bool | None = Field(
        None, description="Adds `usage.speculation`, and `pearl` (tokens, their text and origin) to each choice."
    )
    draft_temperature: float | None = Field(None, ge=0, le=100)
    verification: Verification | None = None
    num_speculative_tokens: int | None = Field(
        None, ge=0, le=64, description="Tokens drafted per round; 0: the target alone; null: the engine's choice."
    )

    def sampling(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        structured: StructuredOutputsParams | None,
        **others: int | None,
    ) -> SamplingParams:
        """The engine's parameters; ``null`` is the default of each, ``others`` come before the fields.

        Raises:
            ConfigError: values that don't go together.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None} | others
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, structured_outputs=structured, **given)

    def check(self) -> None:
        """Raise ``ApiError`` for what no single field shows."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs can't be streamed", param="prompt_logprobs", code="invalid_value")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "prompt_logprobs",
    "draft_temperature",
    "verification",
    "num_speculative_tokens",
)


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(16, ge=0, lt=2**31, description="0: only with `echo`; nothing is generated.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = Field(None, description="The prompt stands before the answer, its `logprobs` too.")
    add_special_tokens: bool = True
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens may be 0 only with echo: true", param="max_tokens", code="invalid_value")


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What clients send back with an answer of ours; there is never anything in it.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionOf(Body):
    name: str


class NamedToolChoice(Body):
    type: Literal["function"]
    function: FunctionOf


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's own template.")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(
                400, "max_tokens and max_completion_tokens differ; send one", param="max_tokens", code="invalid_value"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")


class TokenizeRequest(Body):
    """Body of ``POST /tokenize``: a prompt, or messages as the chat template writes them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="Default: with a prompt, not with messages.")
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=1_000_000)
