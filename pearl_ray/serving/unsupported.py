"""THE table of what the schema knows and the engine doesn't honour yet. Deleting a line switches a field on.

A field that a request may carry without asking for anything (``null``, ``false``, "text") is accepted with the values
listed; any other value is refused with 400, never ignored. Fields that the schema doesn't know are refused by it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pearl_ray.serving.errors import ApiError

# body -> field -> the values that ask for nothing; null always does.
NOT_HONOURED: dict[str, dict[str, tuple[Any, ...]]] = {
    "chat": {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none",),
        "parallel_tool_calls": (True, False),  # says how tools are called, and there are none
        "store": (False,),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
    },
    "message": {
        "tool_calls": ([],),
        "tool_call_id": (),
    },
    "completion": {
        "echo": (False,),
        "suffix": ("",),
        "best_of": (1,),
    },
}


def refuse_unsupported(kind: str, body: BaseModel, prefix: str = "") -> None:
    """Raise ``ApiError`` (400) for the first field of ``body`` that asks for what isn't honoured."""
    for name, neutral in NOT_HONOURED[kind].items():
        value = getattr(body, name)
        asked = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
        if asked is None or any(asked == one and type(asked) is type(one) for one in neutral):
            continue
        param = f"{prefix}{name}"
        hint = f"; it may only be {' or '.join(map(repr, neutral))}" if neutral else ""
        raise ApiError(400, f"{param} is not supported by this server{hint}", param=param, code="unsupported_parameter")
