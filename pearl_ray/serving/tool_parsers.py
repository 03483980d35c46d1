"""Calls of tools read out of an answer's text as it comes, in the forms that models write. Knows no requests, no HTTP.

A parser is fed the text in pieces of any size and gives out what is text for the reader and which calls are whole. What
begins like a call and is none (bad JSON, an unknown function) is text. A call is given out once it is complete.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
LLAMA_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What became clear by the last piece of text."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)


class Parser(ABC):
    """Of one answer. ``names``: the functions that may be called."""

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._rest, self._out = names, "", _Output()

    def feed(self, text: str) -> Parsed:
        """Go on by a piece of text."""
        self._rest += text
        while self._step():
            pass
        return self._out.take()

    @abstractmethod
    def finish(self) -> Parsed:
        """The answer has ended: what was held back."""

    @abstractmethod
    def _step(self) -> bool:
        """Get on by one part of the text; False: not before there is more of it."""


class HermesParser(Parser):
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` anywhere in the text (Hermes, Qwen); see the module.

    Args:
        in_call: the prompt ended inside a call, behind its opening mark.
    """

    def __init__(self, names: Collection[str], *, in_call: bool = False) -> None:
        super().__init__(names)
        self._object: _ObjectEnd | None = _ObjectEnd() if in_call else None
        self._mark = "" if in_call else HERMES_OPEN
        self._closing = False

    def finish(self) -> Parsed:
        if not self._closing:
            self._out.say((self._mark if self._object is not None else "") + self._rest)
        self._rest = ""
        return self._out.take_last()

    def _step(self) -> bool:
        if self._closing:
            rest = self._rest.lstrip()
            if not rest or (len(rest) < len(HERMES_CLOSE) and HERMES_CLOSE.startswith(rest)):
                return False
            self._rest = rest.removeprefix(HERMES_CLOSE) if rest.startswith(HERMES_CLOSE) else self._rest
            self._closing = False
            return True
        if self._object is None:
            before, mark, behind = self._rest.partition(HERMES_OPEN)
            if mark:
                self._out.say(before)
                self._rest, self._object, self._mark = behind, _ObjectEnd(), HERMES_OPEN
                return True
            held = _held_back(before, HERMES_OPEN)
            self._out.say(before[: len(before) - held])
            self._rest = before[len(before) - held :]
            return False
        end = self._object.find(self._rest)
        if end is None:
            return False
        call = call_of(self._rest[:end], "arguments", self._names)
        if call is None:
            self._out.say(self._mark + self._rest[:end])
        else:
            self._out.call(call)
            self._closing = True
        self._rest, self._object = self._rest[end:], None
        return bool(self._rest)


class LlamaParser(Parser):
    """``{"name": …, "parameters": {…}}`` as the whole answer (several: ``;`` between) or behind ``<|python_tag|>``."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._object: _ObjectEnd | None = None
        self._may_call, self._mark = True, ""

    def finish(self) -> Parsed:
        if self._object is not None or not self._out.called or self._rest.strip(" \n\t;"):
            self._out.say(self._mark + self._rest)
        self._rest = self._mark = ""
        return self._out.take_last()

    def _step(self) -> bool:
        if self._object is not None:
            end = self._object.find(self._rest)
            if end is None:
                return False
            call = call_of(self._rest[:end], "parameters", self._names)
            if call is None:
                self._out.say(self._mark + self._rest[:end])
                self._may_call = False
            else:
                self._out.call(call)
            self._rest, self._object, self._mark = self._rest[end:], None, ""
            return bool(self._rest)
        if self._may_call:
            rest = self._rest.lstrip(" \n\t;" if self._out.called else None)
            if not rest or (len(rest) < len(LLAMA_TAG) and LLAMA_TAG.startswith(rest)):
                return False
            if rest.startswith("{"):
                self._rest, self._object = rest, _ObjectEnd()
                return True
            self._may_call = False
        before, tag, behind = self._rest.partition(LLAMA_TAG)
        if tag:
            self._out.say(before)
            self._rest, self._may_call, self._mark = behind, True, tag
            return True
        held = _held_back(before, LLAMA_TAG)
        self._out.say(self._mark + before[: len(before) - held])
        self._rest, self._mark = before[len(before) - held :], ""
        return False


def call_of(text: str, key: str, names: Collection[str]) -> Call | None:
    """The call that a JSON object spells, its arguments under ``key``; None if it is none of these functions."""
    try:
        found: Any = json.loads(text, parse_constant=_refuse)
        name = found["name"]
        arguments = found[key] if key in found else found.get("arguments", {})
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if any("\ud800" <= c <= "\udfff" for c in written):  # escaped in the text, and no UTF-8
            written = json.dumps(arguments)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Call(name, written)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _held_back(text: str, mark: str) -> int:
    """Characters at the end of the text that may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


class _ObjectEnd:
    """Finds where a JSON object ends in a text that grows; looks at each character once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Index behind the object; of the first other character where none begins; None: it isn't complete."""
        while self._at < len(text):
            char = text[self._at]
            self._at += 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                else:
                    self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"' and self._depth:
                self._in_string = True
            elif char in "{[" and (self._depth or char == "{"):
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return self._at
            elif not self._depth and not char.isspace():
                return self._at - 1
        return None


class _Output:
    """What is to be given out. Blanks around calls are dropped: they are held until text follows."""

    def __init__(self) -> None:
        self._parsed, self._blank, self.called = Parsed(), "", False

    def say(self, text: str) -> None:
        text = self._blank + text
        kept = text.rstrip()
        self._parsed.text += kept
        self._blank = text[len(kept) :]

    def call(self, call: Call) -> None:
        self._parsed.calls.append(call)
        self._blank, self.called = "", True

    def take(self) -> Parsed:
        parsed, self._parsed = self._parsed, Parsed()
        return parsed

    def take_last(self) -> Parsed:
        if not self.called:
            self._parsed.text += self._blank
        self._blank = ""
        return self.take()
