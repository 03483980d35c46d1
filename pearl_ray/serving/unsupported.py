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
        "store": (False,),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
    },
    "completion": {
        "suffix": ("",),
        "best_of": (1,),
    },
}

# What to do instead, where there is something.
INSTEAD = {
    "best_of": "send n, and choose among the answers",
    "suffix": "write it into the prompt, in the form that the model was trained on",
}


def refuse_unsupported(kind: str, body: BaseModel) -> None:
    """Raise ``ApiError`` (400) for the first field of ``body`` that asks for what isn't honoured."""
    for name, neutral in NOT_HONOURED[kind].items():
        value = getattr(body, name)
        if value is None or any(value == one and type(value) is type(one) for one in neutral):
            continue
        hint = f"; it may only be {' or '.join(map(repr, neutral))}" if neutral else ""
        hint += f"; {INSTEAD[name]}" if name in INSTEAD else ""
        raise ApiError(400, f"{name} is not supported by this server{hint}", param=name, code="unsupported_parameter")
