"""What an answer that may or must call tools is held to: JSON schemas of calls, and Lark around them. Knows no HTTP.

A call is held to its function's schema if it is forced, and where the function is ``strict``; other calls' arguments
are some object. Forms are those of `tool_parsers`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pearl_ray.core.params import StructuredOutputsParams
from pearl_ray.serving.schema import FunctionDefinition
from pearl_ray.serving.tool_parsers import HERMES_CLOSE, HERMES_OPEN

Form = Literal["hermes", "llama3_json"]
ARGUMENTS: dict[Form, str] = {"hermes": "arguments", "llama3_json": "parameters"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# `model.grammar` bounds the blanks of a schema that is the whole answer; in Lark a schema says so itself.
_BLANKS = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}
# `open` ends at the first mark, so that what is said has none; `said` is the rest of an answer, or all of it.
_HERMES = f"""
open[lazy]: TEXT "{HERMES_OPEN}"
whole: open GAP call GAP "{HERMES_CLOSE}"
said: TEXT
TEXT: /(.|\\n)*/
"""
_LLAMA = """
said: TEXT
TEXT: /([^{].*(\\n.*)*)?/
"""

_MORE_OF_LLAMA = '(";" GAP call)*'


def calls_alone(functions: Sequence[FunctionDefinition], form: Form, *, several: bool) -> StructuredOutputsParams:
    """Nothing but a call, or several: in Hermes' form what follows the first opening mark.

    Raises:
        ConfigError: a function's parameters can't be JSON.
    """
    schema = _schema_of(functions, form, all_strict=True)
    if not several:
        return StructuredOutputsParams(json=schema)
    more = f'(GAP "{HERMES_CLOSE}" GAP "{HERMES_OPEN}" GAP call)* GAP "{HERMES_CLOSE}"'
    return _lark(f"start: call {more if form == 'hermes' else _MORE_OF_LLAMA}\n", schema)


def text_or_calls(functions: Sequence[FunctionDefinition], form: Form, *, several: bool) -> StructuredOutputsParams:
    """Text with whole calls in it, in Hermes' form; text or calls, in Llama's. Raises as :func:`calls_alone`."""
    schema = _schema_of(functions, form, all_strict=False)
    if form == "hermes":
        return _lark(f"start: {'whole* said' if several else 'said | whole'}\n{_HERMES}", schema)
    return _lark(f"start: said | call{' ' + _MORE_OF_LLAMA if several else ''}\n{_LLAMA}", schema)


def answer_or_calls(
    functions: Sequence[FunctionDefinition], form: Form, *, several: bool, answer: StructuredOutputsParams
) -> StructuredOutputsParams:
    """Calls and nothing else, or an answer as ``answer`` has it: its ``json`` or ``json_object``. Raises as
    :func:`calls_alone`.
    """
    schema = _schema_of(functions, form, all_strict=False)
    whole = f'"{HERMES_OPEN}" GAP call GAP "{HERMES_CLOSE}"' if form == "hermes" else "call"
    more = f" (GAP {whole})*" if form == "hermes" else f" {_MORE_OF_LLAMA}"
    wanted = json.loads(answer.json) if isinstance(answer.json, str) else {"type": "object"}
    return _lark(f"start: answer | {whole}{more if several else ''}\nanswer: {_json(wanted)}", schema)


def _lark(rules: str, schema: dict[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(grammar=f"{rules}\ncall: {_json(schema)}\nGAP: /[ \\n]{{0,4}}/\n")


def _json(schema: object) -> str:
    """The schema as a rule of Lark; one that is no object (``true``) is left as it is."""
    return f"%json {json.dumps({**schema, 'x-guidance': _BLANKS} if isinstance(schema, dict) else schema)}"


def _schema_of(functions: Sequence[FunctionDefinition], form: Form, *, all_strict: bool) -> dict[str, Any]:
    """A JSON schema of one call of one of the functions. Their own schemas keep their inner references."""
    calls, homes, key = [], {}, ARGUMENTS[form]
    for index, function in enumerate(functions):
        home = f"#/$defs/tool{index}"
        is_held = all_strict or function.strict
        homes[f"tool{index}"] = _moved(parameters_of(function), home) if is_held else {"type": "object"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, key: {"$ref": home}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": homes}


def parameters_of(function: FunctionDefinition) -> dict[str, Any]:
    """Arguments are an object whatever else the schema says; no schema: there are none."""
    return {"type": "object", **function.parameters} if function.parameters else NO_ARGUMENTS


def _moved(schema: Any, home: str) -> Any:  # noqa: ANN401 - any JSON
    """The schema with its references into itself as they are once it stands at ``home``."""
    if isinstance(schema, list):
        return [_moved(part, home) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: home + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, home)
        for key, value in schema.items()
    }
