"""Tokens to text, as they are committed, and where a stop string ends it. Knows no tokenizer: ``decode`` is handed in.

Text is released once no later token can change it: characters whose bytes aren't complete are held back, and so is
text that may turn out to be the start of a stop string. The result depends on the tokens alone, never on how they
were grouped into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not, or not yet, a character
_HELD_MAX = 3  # an incomplete UTF-8 character has at most 3 bytes, each at most one replacement character
_WINDOW = 16  # tokens decoded per step, at most (twice as many while no cut is found)
_CONTEXT_CHARS = 4  # decided characters that a window keeps before its open ones; more than _HELD_MAX
_PROMPT_TOKENS = 8  # so that the first token's leading space, or the rest of a character, comes out right


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one call of :meth:`Detokenizer.append` released.

    Attributes:
        text: new final text, to be concatenated; may be empty.
        stop_reason: the stop string that was found, or None.
        num_tokens_used: how many of all tokens appended so far remain: all of them, or up to and including the one
            that completed the stop string.
    """

    text: str
    stop_reason: str | None
    num_tokens_used: int


class Detokenizer:
    """The text of one growing token list.

    Args:
        decode: token ids to text, with replacement characters for incomplete bytes. The decoding of a list's tail is
            taken for the tail of its decoding, but for the first characters.
        prompt_ids: the tokens before; the end of them is context for the first ones appended.
        stop: strings that end the text. The one that is complete first counts, the longest where two end together.
        include_stop_str_in_output: whether the stop string stays in the text.
        min_tokens: stop strings completed within so many tokens are passed over.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tail = _TailDecoder(decode, prompt_ids)
        self._stops = _StopMatcher(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._held = ""  # decided text that may be the start of a stop string
        self._released: list[str] = []
        self._num_tokens = 0
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """All text released so far."""
        if len(self._released) > 1:
            self._released = ["".join(self._released)]
        return self._released[0] if self._released else ""

    def append(self, token_ids: Sequence[int]) -> TextDelta:
        """Take in tokens; those behind a stop string are ignored. A stopped detokenizer takes no more."""
        assert self.stop_reason is None, "appended to a text that a stop string has ended"
        parts: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            parts.append(self._through_stops(self._tail.append(token_id), self._num_tokens > self._min_tokens))
            if self.stop_reason is not None:
                break
        text = "".join(parts)
        self._released.append(text)
        return TextDelta(text, self.stop_reason, self._num_tokens)

    def finish(self) -> str:
        """The text still held back, when no token follows; empty after a stop string."""
        if self.stop_reason is not None:
            return ""
        text = self._held + self._tail.finish()
        self._held = ""
        self._released.append(text)
        return text

    def _through_stops(self, new: str, may_stop: bool) -> str:
        """The part of held + new text that is final; sets ``stop_reason``."""
        if not self._stops:
            return new
        text = self._held + new
        for at, character in enumerate(new, start=len(self._held)):
            stop = self._stops.push(character)
            if stop is not None and may_stop:
                self.stop_reason, self._held = stop, ""
                return text[: at + 1] if self._include_stop else text[: at + 1 - len(stop)]
        cut = len(text) - self._stops.num_open
        self._held = text[cut:]
        return text[:cut]


class _TailDecoder:
    """Decoded characters in order, each once. Decodes a bounded window of the newest tokens per step."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-_PROMPT_TOKENS:])
        self._prompt_text = decode(self._ids) if self._ids else ""
        self._given = _decided(self._prompt_text)  # the part of the window's text that is given out
        self._is_fresh = bool(self._ids)  # nothing behind the prompt is given out
        self._num_disturbed = 0
        self._limit = _WINDOW

    def append(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # Byte fallback turns a whole run of bytes into replacement characters while its last character is incomplete,
        # also those given out already. It is complete within a few tokens, or the bytes are none.
        if not text.startswith(self._given) and self._num_disturbed < _HELD_MAX:
            self._num_disturbed += 1
            return ""
        self._num_disturbed = 0
        new = self._advance(text, _decided(text))
        if len(self._ids) >= self._limit:
            self._shorten(text)
        return new

    def finish(self) -> str:
        text = self._decode(self._ids) if self._ids else ""
        return self._advance(text, text)

    def _advance(self, text: str, decided: str) -> str:
        if len(decided) <= len(self._given):
            return ""
        if self._is_fresh and text.startswith(self._prompt_text):
            # The prompt ended in a replacement character and the output didn't complete it: it is the prompt's.
            self._given = self._prompt_text
        new = decided[len(self._given) :]
        self._given, self._is_fresh = decided, False
        return new

    def _shorten(self, text: str) -> None:
        """Drop old tokens from the window where the rest decodes to the end of the same text.

        The rest must show more characters than an incomplete one has bytes: then the cut isn't inside it.
        """
        num_pending = len(text) - len(self._given)
        for keep in range(4, len(self._ids) // 2 + 1):
            rest = self._ids[-keep:]
            tail = self._decode(rest)
            if len(tail) >= num_pending + _CONTEXT_CHARS and text.endswith(tail) and not self._is_fresh:
                self._ids, self._given, self._limit = rest, tail[: len(tail) - num_pending], keep + _WINDOW
                return
        self._limit = 2 * len(self._ids)


def _decided(text: str) -> str:
    """The text without the trailing replacement characters that later bytes may still turn into something else."""
    num = 0
    while num < min(_HELD_MAX, len(text)) and text[-1 - num] == _REPLACEMENT:
        num += 1
    return text[: len(text) - num]


class _StopMatcher:
    """Knuth-Morris-Pratt over several patterns, a character at a time."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)  # the longest first wins a tie
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)

    def __bool__(self) -> bool:
        return bool(self._stops)

    @property
    def num_open(self) -> int:
        """Characters at the end of the text that begin a stop string."""
        return max(self._matched)

    def push(self, character: str) -> str | None:
        """The longest stop string that ends in this character, if any."""
        found = None
        for i, stop in enumerate(self._stops):
            failure, k = self._failures[i], self._matched[i]
            while k and stop[k] != character:
                k = failure[k - 1]
            k += stop[k] == character
            if k == len(stop):
                found = found or stop
                k = failure[k - 1]
            self._matched[i] = k
        return found


def _failure_function(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is its suffix too."""
    failure, k = [0] * len(pattern), 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = failure[k - 1]
        k += pattern[i] == pattern[k]
        failure[i] = k
    return failure
