"""What a chat request wants of tools: how they're told to the model, how a call is forced, which parser reads it.

A model whose chat template knows tools is told by it; any other by a system message in Qwen's words. What calls are
held to is made by `call_grammars`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl_ray.core.errors import RequestRefusedError
from pearl_ray.core.params import StructuredOutputsParams
from pearl_ray.serving.backend import Tokenizer
from pearl_ray.serving.call_grammars import (
    ARGUMENTS,
    NO_ARGUMENTS,
    Form,
    answer_or_calls,
    calls_alone,
    parameters_of,
    text_or_calls,
)
from pearl_ray.serving.errors import ApiError
from pearl_ray.serving.schema import ChatCompletionRequest, FunctionDefinition, Message, NamedToolChoice
from pearl_ray.serving.settings import ToolCallParser
from pearl_ray.serving.tool_parsers import HERMES_CLOSE, HERMES_OPEN, HermesParser, LlamaParser, Parser

_PROBE = "pearl_ray_probe"
_TOLD: dict[Form, str] = {
    "hermes": (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
    ),
    "llama3_json": (
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt. Respond in the format {{"name": function name, "parameters": dictionary of '
        "argument name and its value}}. Do not use variables.\n\n{tools}"
    ),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model is told of tools and writes calls.

    Attributes:
        form: None: its template knows tools and writes calls in a form that isn't known here.
        native: whether its template knows tools.
    """

    form: Form | None
    native: bool


def dialect_of(tokenizer: Tokenizer, chosen: ToolCallParser) -> Dialect:
    """Found out by what the template makes of a tool; ``chosen``: the form, or "auto"."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": NO_ARGUMENTS}}
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=[tool])
    except RequestRefusedError:  # no template, or one that has no place for tools
        text = ""
    native = _PROBE in text
    if chosen != "auto":
        return Dialect(chosen, native)
    if not native or HERMES_OPEN in text:
        return Dialect("hermes", native)
    is_llama = "<|start_header_id|>" in text or '"parameters": dictionary' in text
    return Dialect("llama3_json" if is_llama else None, native)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request that may be called.

    Attributes:
        forced: one of them must be.
        several: an answer may have more than one call.
    """

    functions: tuple[FunctionDefinition, ...]
    forced: bool
    form: Form
    several: bool

    @property
    def holds_calls(self) -> bool:
        """Whether calls are held to their functions' schemas."""
        return self.forced or any(function.strict for function in self.functions)

    def grammar(self, answer: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What the answer is held to; raises ``ConfigError`` if a function's parameters can't be JSON.

        Where the model may choose and no function is strict, it is held to nothing.

        Args:
            answer: what an answer without calls is held to.
        """
        if self.forced:
            return calls_alone(self.functions, self.form, several=self.several)
        if answer is not None:
            return answer_or_calls(self.functions, self.form, several=self.several, answer=answer)
        if self.holds_calls:
            return text_or_calls(self.functions, self.form, several=self.several)
        return None

    @property
    def prompt_end(self) -> str:
        """What the assistant is made to begin with."""
        return f"{HERMES_OPEN}\n" if self.forced and self.form == "hermes" else ""

    def parser(self) -> Parser:
        """A fresh one, for one answer."""
        names = frozenset(function.name for function in self.functions)
        if self.form == "hermes":
            return HermesParser(names, in_call=self.forced)
        return LlamaParser(names)


def tool_use(body: ChatCompletionRequest, dialect: Dialect) -> ToolUse | None:
    """What the request wants of tools; None where none may be called.

    Raises:
        ApiError: (400) the fields don't go together, or can't be honoured.
    """
    functions = [tool.function for tool in body.tools or ()]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise _bad("tools", "two functions have the same name")
    choice = body.tool_choice
    if not functions:
        if choice not in (None, "none"):
            raise _bad("tool_choice", "needs tools")
        return None
    if choice == "none":
        return None
    if body.structured_outputs is not None:
        raise _bad("structured_outputs", "can't be followed where tools may be called; send tool_choice: none")
    if not body.add_generation_prompt:
        raise _bad("add_generation_prompt", "must be true where tools may be called")
    forced = isinstance(choice, NamedToolChoice) or choice == "required"
    if isinstance(choice, NamedToolChoice):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise _bad("tool_choice", f"names {choice.function.name!r}, which is none of tools")
    if dialect.form is None:
        what = "the form in which this model calls them isn't known; start the server with --tool-call-parser"
        raise ApiError(400, f"tools: {what}", param="tools", code="unsupported_parameter")
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedToolChoice)
    return ToolUse(tuple(functions), forced, dialect.form, several)


def _bad(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what}", param=param, code="invalid_value")


# -- messages ---------------------------------------------------------------------------------------------------------


def for_template(
    messages: Sequence[Message], functions: Sequence[FunctionDefinition], dialect: Dialect | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as the chat template takes them.

    Args:
        dialect: may be None where neither messages nor functions speak of tools.

    Raises:
        ApiError: (400) calls or their results where they can't be.
    """
    plain = [_plain(message, f"messages.{index}") for index, message in enumerate(messages)]
    tools = [_written(function) for function in functions]
    if dialect is None or dialect.native:
        return plain, tools or None
    form = dialect.form or "hermes"
    plain = [_without_tools(message, form) for message in plain]
    if tools:
        told = _TOLD[form].format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if plain[0]["role"] == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain, None


def speaks_of_tools(message: Message) -> bool:
    """Whether it is a call, or a call's result."""
    return bool(message.tool_calls) or message.role == "tool"


def _written(function: FunctionDefinition) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": parameters_of(function),
        },
    }


def _plain(message: Message, param: str) -> dict[str, Any]:
    """As chat templates expect it: plain text, and the role that older models know."""
    if message.tool_calls and message.role != "assistant":
        raise _bad(f"{param}.tool_calls", "only the assistant calls tools")
    if (message.tool_call_id is not None) != (message.role == "tool"):
        raise _bad(f"{param}.tool_call_id", "goes with role tool, always")
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object(call.function.arguments, f"{param}.tool_calls.{index}.function.arguments"),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return plain


def _object(text: str, param: str) -> dict[str, Any]:
    """Templates want the arguments as an object."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _bad(param, "must be a JSON object, as text")
    return found


def _without_tools(message: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Calls as the model writes them, and results as the user's words, for a template that knows neither."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        json.dumps(
            {"name": call["function"]["name"], ARGUMENTS[form]: call["function"]["arguments"]}, ensure_ascii=False
        )
        for call in message.get("tool_calls", ())
    ]
    if not calls:
        return dict(message)
    if form == "hermes":
        calls = [f"{HERMES_OPEN}\n{call}\n{HERMES_CLOSE}" for call in calls]
    parts = [message["content"], *(calls if form == "hermes" else ["; ".join(calls)])]
    return {"role": "assistant", "content": "\n".join(filter(None, parts))}
