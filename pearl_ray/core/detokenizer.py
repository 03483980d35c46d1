"""Tokens to text, as they are committed, and where a stop string ends it. Knows no tokenizer: ``decode`` is handed in.

Text is released once no later token can change it: characters whose bytes aren't complete are held back, and so is
text that may turn out to be the start of a stop string. The result depends on the tokens alone, never on how they
were grouped into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not, or not yet, a character
_HELD_MAX = 3  # an incomplete UTF-8 character has at most 3 bytes, each at most one replacement character
_WINDOW = 16  # tokens that are kept, and appended at once, at most (more are kept while no cut is found)
_CONTEXT_CHARS = 4  # decided characters that a window keeps before its open ones; more than _HELD_MAX
_PROMPT_TOKENS = 8  # so that the first token's leading space, or the rest of a character, comes out right


class TextDelta(msgspec.Struct, frozen=True, gc=False):
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
        self._stops = _StopMatcher(stop) if stop else None
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
        text = self._append_at_once(token_ids) if 0 < len(token_ids) <= _WINDOW else None
        if text is None:
            text = self._append_in_parts(token_ids)
        if text:
            self._released.append(text)
        return TextDelta(text, self.stop_reason, self._num_tokens)

    def _append_in_parts(self, token_ids: Sequence[int]) -> str:
        text = ""
        for start in range(0, len(token_ids), _WINDOW):
            part = token_ids[start : start + _WINDOW]
            new = self._append_at_once(part)
            text += new if new is not None else self._append_one_by_one(part)
            if self.stop_reason is not None:
                break
        return text

    def _append_at_once(self, token_ids: Sequence[int]) -> str | None:
        """All the tokens in one decoding; None, and nothing changed, where which token did what matters.

        It does where a stop string ends, and where bytes aren't, or not yet, a character: byte fallback shows whole
        characters before them as replacement characters too, which one by one were given out.
        """
        tail, stops = self._tail, self._stops
        peeked = tail.peek(token_ids)
        if peeked is None or _REPLACEMENT in peeked.new or len(peeked.decided) < len(peeked.text):
            return None
        text = peeked.new
        if stops is not None and (self._held or stops.may_begin_in(text)):
            text = self._held + text
            if stops.first_end(text, len(self._held)) is not None:
                return None
            text = self._hold_back(text)
        self._num_tokens += len(token_ids)
        tail.take(peeked)
        return text

    def _append_one_by_one(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            parts.append(self._through_stops(self._tail.append(token_id), self._num_tokens > self._min_tokens))
            if self.stop_reason is not None:
                break
        return "".join(parts)

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
        if self._stops is None:
            return new
        text = self._held + new
        found = self._stops.first_end(text, len(self._held)) if may_stop else None
        if found is None:
            return self._hold_back(text)
        end, self.stop_reason = found
        self._held = ""
        return text[:end] if self._include_stop else text[: end - len(self.stop_reason)]

    def _hold_back(self, text: str) -> str:
        """The part of the text that is final; the rest may be the start of a stop string."""
        assert self._stops is not None
        num_open = self._stops.num_open(text)
        if not num_open:
            self._held = ""
            return text
        self._held = text[-num_open:]
        return text[:-num_open]


class _Peeked(msgspec.Struct, frozen=True, gc=False):
    """The window with tokens appended: its text, the decided part of it, and what of that is new."""

    ids: list[int]
    text: str
    decided: str
    new: str


class _TailDecoder:
    """Decoded characters in order, each once. Decodes a bounded window of the newest tokens per step.

    How tokens are grouped into :meth:`peek` doesn't matter: its text goes on from what was given out, or it is refused.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-_PROMPT_TOKENS:])
        self._prompt_text = decode(self._ids) if self._ids else ""
        self._given = _decided(self._prompt_text)  # the part of the window's text that is given out
        self._is_fresh = bool(self._ids)  # nothing behind the prompt is given out
        self._num_disturbed = 0
        self._limit = _WINDOW

    def append(self, token_id: int) -> str:
        peeked = self.peek((token_id,))
        if peeked is not None:
            return self.take(peeked)
        # Byte fallback turns a whole run of bytes into replacement characters while its last character is incomplete,
        # also those given out already. It is complete within a few tokens, or the bytes are none.
        self._ids.append(token_id)
        if self._num_disturbed < _HELD_MAX:
            self._num_disturbed += 1
            return ""
        text = self._decode(self._ids)
        return self.take(_Peeked(self._ids, text, _decided(text), self._new(text, _decided(text))))

    def peek(self, token_ids: Sequence[int]) -> _Peeked | None:
        """What appending these tokens gives; None where it disturbs what was given out. Changes nothing."""
        ids = [*self._ids, *token_ids]
        text = self._decode(ids)
        if not text.startswith(self._given):
            return None
        if self._is_fresh or text.endswith(_REPLACEMENT):
            decided = _decided(text)
            return _Peeked(ids, text, decided, self._new(text, decided))
        return _Peeked(ids, text, text, text[len(self._given) :])

    def take(self, peeked: _Peeked) -> str:
        """Append them."""
        self._ids, self._num_disturbed = peeked.ids, 0
        if peeked.new:
            self._given, self._is_fresh = peeked.decided, False
        if len(self._ids) >= self._limit:
            self._shorten(peeked.text)
        return peeked.new

    def finish(self) -> str:
        text = self._decode(self._ids) if self._ids else ""
        return self.take(_Peeked(self._ids, text, text, self._new(text, text)))

    def _new(self, text: str, decided: str) -> str:
        """The part of ``decided`` that isn't given out yet."""
        if len(decided) <= len(self._given):
            return ""
        # A prompt that ended in a replacement character which the output didn't complete: it is the prompt's.
        is_prompts = self._is_fresh and text.startswith(self._prompt_text)
        return decided[len(self._prompt_text if is_prompts else self._given) :]

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
    """Where stop strings end and begin in a piece of text; there is at least one."""

    def __init__(self, stops: Sequence[str]) -> None:
        longest_first = sorted(set(stops), key=len, reverse=True)  # the longest wins a tie
        self._stops = [(stop, stop[0], len(stop)) for stop in longest_first]
        self._firsts = sorted({stop[0] for stop in stops})

    def may_begin_in(self, text: str) -> bool:
        """Whether the text has a character with which a stop string begins; where it doesn't none ends or begins."""
        for first in self._firsts:  # noqa: SIM110 - asked once per round: a generator costs five times as much
            if first in text:
                return True
        return False

    def first_end(self, text: str, after: int) -> tuple[int, str] | None:
        """The first end of a stop string behind ``after`` characters, and which one (the longest) ends there."""
        found: tuple[int, str] | None = None
        for stop, _, length in self._stops:
            if stop in text:
                at = text.find(stop, max(after + 1 - length, 0))
                if at >= 0 and (found is None or at + length < found[0]):
                    found = at + length, stop
        return found

    def num_open(self, text: str) -> int:
        """Characters at the end of the text that begin a stop string, at most."""
        most, end = 0, len(text)
        for stop, first, length in self._stops:
            at = text.find(first, end + 1 - length if length <= end else 0)
            while 0 <= at < end - most:
                if stop.startswith(text[at:]):
                    most = end - at
                    break
                at = text.find(first, at + 1)
        return most
