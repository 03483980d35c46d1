"""What a request asks for. Frozen, checked when made; knows nothing of models or engines."""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass, field
from typing import Any, Literal

from pearl_ray.core.errors import ConfigError

Verification = Literal["coupled", "rejection"]

MAX_INT = 2**31 - 1  # of counts and ids: what every message, tensor and JSON body can hold


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What an answer must look like, as a whole; exactly one field is set. Names are vLLM's.

    Attributes:
        json: a JSON schema, as a dict or as JSON text; kept as text. The answer is JSON that fits it.
        json_object: the answer is a JSON object, of any shape.
        regex: the whole answer matches it (Rust's syntax: no look-around, no back-references).
        choice: the answer is one of these strings.
        grammar: the whole answer is a sentence of this grammar, in Lark's syntax as llguidance reads it.

    Raises:
        ConfigError: naming the field, its value and what is allowed. Whether a schema or regex can be followed is
            found out by ``model.grammar``, when the request is submitted.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise ConfigError("json_object", self.json_object, "True or False")
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) + self.json_object != 1:
            found = ", ".join(given + ["json_object"] * self.json_object) or None
            raise ConfigError(
                "structured_outputs", found, "exactly one of json, json_object, regex, choice and grammar"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _as_schema_text(self.json))
        if self.regex is not None and not (isinstance(self.regex, str) and self.regex and _is_unicode(self.regex)):
            raise ConfigError("regex", _brief(self.regex), "a non-empty regular expression")
        if self.choice is not None:
            choice = tuple(self.choice) if isinstance(self.choice, (list, tuple)) else ()
            if not choice or any(not isinstance(c, str) or not c or not _is_unicode(c) for c in choice):
                raise ConfigError("choice", _brief(self.choice), "a list of one or more non-empty strings")
            object.__setattr__(self, "choice", choice)
        if self.grammar is not None and not (
            isinstance(self.grammar, str) and self.grammar and _is_unicode(self.grammar)
        ):
            raise ConfigError("grammar", _brief(self.grammar), "the text of a Lark grammar")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and defaults are vLLM's.

    Applied in this order to the target's and the draft's logits alike: repetition, presence and frequency
    penalties, ``logit_bias``, ``min_tokens`` (stop tokens masked), ``structured_outputs``, temperature, ``top_k``,
    ``top_p``, ``min_p``.

    Three fields are about speculation: ``draft_temperature`` (None: the request's own), ``verification`` (None: the
    engine's), ``num_speculative_tokens`` (tokens the draft makes per round for this request; None: the engine's choice,
    0: none, the target decodes alone).

    ``structured_outputs`` masks what its grammar forbids, and once all is said everything but the end of the text; it
    comes before ``min_tokens`` where both can't be met.

    Raises:
        ConfigError: (a ``ValueError``) naming the field, its value and the allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    draft_temperature: float | None = None
    verification: Verification | None = None
    num_speculative_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))
        if self.top_k == -1:  # vLLM's other spelling of "no limit"
            object.__setattr__(self, "top_k", 0)
        _whole("n", self.n, 1, 64)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, 0, MAX_INT)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, MAX_INT)
        _whole("min_tokens", self.min_tokens, 0, MAX_INT if self.max_tokens is None else self.max_tokens)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, 20)
        if self.draft_temperature is not None:
            _number("draft_temperature", self.draft_temperature, 0.0, 100.0)
        if self.num_speculative_tokens is not None:
            _whole("num_speculative_tokens", self.num_speculative_tokens, 0, 64)
        if self.verification not in (None, "coupled", "rejection"):
            raise ConfigError("verification", self.verification, "'coupled', 'rejection' or None (the engine's)")
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError("ignore_eos", self.ignore_eos, "True or False")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise ConfigError("structured_outputs", self.structured_outputs, "a StructuredOutputsParams, or None")

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens came before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def has_filters(self) -> bool:
        """Whether top-k, top-p or min-p cut the support."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def _as_schema_text(value: object) -> str:
    """The schema as JSON text, checked to be a JSON object."""
    try:
        text = value if isinstance(value, str) else jsonlib.dumps(value, allow_nan=False)
        if isinstance(jsonlib.loads(text), dict) and _is_unicode(text):
            return text
    except (TypeError, ValueError, RecursionError):
        pass
    raise ConfigError("json", _brief(value), "a JSON schema: an object, as a dict or as JSON text")


def _brief(value: object) -> object:
    """The value for a message: of a long text the start."""
    return f"{value[:79]}…" if isinstance(value, str) and len(value) > 80 else value


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which have no bytes."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _as_stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) and s and _is_unicode(s) for s in stops):
        raise ConfigError("stop", value, "a non-empty string, or a list of non-empty strings")
    return tuple(stops)


def _as_ids(name: str, value: object) -> tuple[int, ...]:
    ids = () if value is None else value
    if not isinstance(ids, (list, tuple)) or any(not _is_id(t) for t in ids):
        raise ConfigError(name, value, f"a list of token ids, whole numbers from 0 to {MAX_INT}")
    return tuple(ids)


def _as_bias(value: object) -> dict[int, float]:
    """Ids may be decimal text, as JSON's keys are."""
    given = {} if value is None else value
    if isinstance(given, dict):
        pairs = [(_as_id(key), amount) for key, amount in given.items()]
        if all(_is_id(token) and _is_bias(amount) for token, amount in pairs):
            return {token: float(amount) for token, amount in pairs}
    allowed = f"a mapping from token ids (from 0 to {MAX_INT}) to biases in [-100, 100]"
    raise ConfigError("logit_bias", value, allowed)


def _as_id(key: Any) -> Any:  # noqa: ANN401
    is_decimal = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20
    return int(key) if is_decimal else key


def _is_bias(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -100.0 <= value <= 100.0


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(name, value, f"a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = not isinstance(value, bool) and isinstance(value, (int, float))
    if not ok or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        raise ConfigError(name, value, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]")
