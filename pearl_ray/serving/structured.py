"""From a body's fields to the engine's ``StructuredOutputsParams``, and its complaints back to the field to blame.

Knows the fields ``response_format`` (OpenAI's) and ``structured_outputs`` (vLLM's); no grammars.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pearl_ray.core.errors import ConfigError, UnsupportedModelError
from pearl_ray.core.params import StructuredOutputsParams
from pearl_ray.serving.errors import ApiError
from pearl_ray.serving.schema import ResponseFormat, StructuredOutputs

_FIELDS = frozenset(["json", "json_object", "regex", "choice", "grammar", "structured_outputs"])


def of_response_format(wanted: ResponseFormat | None) -> StructuredOutputsParams | None:
    """What the answer must look like; None for plain text. ``strict`` or not, a schema is always followed.

    Raises:
        ApiError, ConfigError: no schema, or one that is none.
    """
    if wanted is None or (wanted.type != "json_schema" and wanted.json_schema is not None):
        if wanted is not None:
            raise _bad("response_format.json_schema", "goes with type json_schema only")
        return None
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise _bad("response_format.json_schema.schema", "is needed with type json_schema")
    return StructuredOutputsParams(json=wanted.json_schema.schema_)


def of_structured_outputs(wanted: StructuredOutputs | None) -> StructuredOutputsParams | None:
    """vLLM's form of the same; raises ``ConfigError`` unless exactly one kind is asked for."""
    if wanted is None:
        return None
    choice = tuple(wanted.choice) if wanted.choice is not None else None
    return StructuredOutputsParams(
        json=wanted.json_,
        json_object=bool(wanted.json_object),
        regex=wanted.regex,
        choice=choice,
        grammar=wanted.grammar,
    )


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """What is wrong with a schema, regex or choice leaves as 400 that names the request's field ``param``."""
    try:
        yield
    except ConfigError as error:
        if error.field not in _FIELDS:
            raise
        raise _bad(param, f"can't be followed: {error.allowed}") from error
    except UnsupportedModelError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="unsupported_parameter") from error


def _bad(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param} {what}", param=param, code="invalid_value")
