"""Grammars: which tokens may come next so that an answer fits its schema, regex or choice. Knows no logits, no rounds.

llguidance parses (docs/decisions/0009-structured-output.md). Its matcher walks bytes, so an answer may be spelled in
any tokens; only where the next bytes are forced does it ask for the tokenizer's own spelling of them. What ends an
answer is kept here: the matcher is never given an end-of-text token, so that going back is a count of tokens it took.

Shapes: V = ``num_valid`` token ids.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits

from pearl_ray.core.errors import ConfigError, UnsupportedModelError
from pearl_ray.core.params import StructuredOutputsParams
from pearl_ray.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CACHED_GRAMMARS = 64  # compiled ones that are kept for the next request of the same kind
# Between JSON's tokens; without the bound, a model may write blanks until max_tokens.
WHITESPACE = r"[ \n\r\t]{1,40}"


class GrammarCompiler:
    """Makes :class:`GrammarState` for one tokenizer.

    Args:
        num_valid: masks are this long; ids from here on are never chosen.
    """

    def __init__(self, tokenizer: Tokenizer, num_valid: int) -> None:
        self._eos = frozenset(tokenizer.eos_token_ids)
        self._num_valid = num_valid
        self._limits = LLParserLimits(verbose_errors=False)
        self._matcher = functools.lru_cache(CACHED_GRAMMARS)(self._compile)
        from llguidance import hf  # brings Transformers, as the tokenizer has by now

        try:
            self._tokenizer = hf.from_tokenizer(tokenizer.hugging_face, eos_token=sorted(self._eos) or None)
        except ValueError as error:
            raise UnsupportedModelError(
                f"structured outputs: the model's tokenizer can't be used ({_reason(str(error))})"
            ) from error
        self._end_V = torch.zeros(num_valid, dtype=torch.bool)
        self._end_V[[token for token in self._eos if token < num_valid]] = True

    def check(self, wanted: StructuredOutputsParams) -> None:
        """Whether there are answers of this kind, and the model can write them. Takes milliseconds; thread-safe.

        Raises:
            ConfigError: naming the field, its value, and what is wrong with it.
        """
        if not self._end_V.any():
            raise ConfigError("structured_outputs", wanted, "a model with an end-of-text token")
        self._matcher(wanted)

    def state(self, wanted: StructuredOutputsParams) -> GrammarState:
        """A fresh state, at the beginning of an answer. Raises ``ConfigError`` as :meth:`check`."""
        return GrammarState(self._matcher(wanted), self._eos, self._end_V)

    def _compile(self, wanted: StructuredOutputsParams) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, _grammar(wanted), limits=self._limits)
        except ValueError as error:
            raise ConfigError(*_field(wanted), _reason(str(error))) from error
        if not matcher.is_error():
            matcher.compute_bitmask()  # some errors show here first
        if matcher.is_error():
            raise ConfigError(*_field(wanted), _reason(matcher.get_error()))
        return matcher


class GrammarState:
    """Where one sequence stands in its grammar: at the end of its committed tokens."""

    def __init__(self, fresh: LLMatcher, eos_token_ids: frozenset[int], end_V: torch.Tensor) -> None:
        self._fresh = fresh  # shared: only ever copied
        self._matcher = fresh.deep_copy()
        self._taken: list[int] = []
        self._eos = eos_token_ids
        self._end_V = end_V
        self._ended = False
        self.num_accepted = 0

    @property
    def is_complete(self) -> bool:
        """Whether what is committed is a whole answer."""
        return self._ended or self._matcher.is_accepting()

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by committed tokens, in order. What follows an end-of-text token says nothing."""
        self.num_accepted += len(tokens)
        for token in tokens:
            if self._ended:
                return
            if token in self._eos:
                self._ended = True
            elif self._matcher.try_consume_tokens([token]) == 1:
                self._taken.append(token)
            else:
                # Nothing of the grammar can be spelled from here (the tokenizer lacks bytes), or a limit was met.
                logger.warning("a grammar can't be followed to its end: the answer is cut short")
                self._ended = True

    def masks_along(self, window: Sequence[int]) -> list[torch.Tensor | None]:
        """``len(window) + 1`` bool masks ``[V]``: the i-th holds for the token behind the committed and ``window[:i]``.

        None behind a token that its own mask forbids: it will be rejected, and what follows it never read. The state
        stays where it was.
        """
        masks = [self._mask(self._ended)]
        ended, taken = self._ended, 0
        for token in window:
            if token >= len(self._end_V) or not masks[-1][token]:
                break
            ended = ended or token in self._eos
            if not ended and self._matcher.try_consume_tokens([token]) == 1:
                taken += 1
            else:  # refused, though it was allowed: as in accept
                ended = True
            masks.append(self._mask(ended))
        self._step_back(taken)
        return [*masks, *[None] * (len(window) + 1 - len(masks))]

    def mask_after(self, window: Sequence[int]) -> torch.Tensor | None:
        """The last of :meth:`masks_along`, without the others; None also where no id below V may follow."""
        ended = next((i for i, token in enumerate(window) if token in self._eos), len(window))
        words = [] if self._ended else list(window[:ended])
        taken = self._matcher.try_consume_tokens(words) if words else 0
        mask_V = self._mask(self._ended or ended < len(window)) if taken == len(words) else None
        self._step_back(taken)
        return mask_V if mask_V is not None and bool(mask_V.any()) else None

    def _step_back(self, count: int) -> None:
        """Forget the last tokens. A matcher in error (a dead end, a limit) never leaves it, and is made anew."""
        if self._matcher.is_error():
            self._matcher = self._fresh.deep_copy()
            self._matcher.consume_tokens(self._taken)
        elif count:
            self._matcher.rollback(count)

    def _mask(self, ended: bool) -> torch.Tensor:
        """The mask where the matcher stands; the end of the text alone where nothing else can follow."""
        if ended:
            return self._end_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask_V = torch.from_numpy(np.unpackbits(bits, count=len(self._end_V), bitorder="little").view(np.bool_))
        return mask_V if bool(mask_V.any()) else self._end_V


def _grammar(wanted: StructuredOutputsParams) -> str:
    """llguidance's own text for what is wanted."""
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return LLMatcher.grammar_from_lark(wanted.grammar)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in wanted.choice))
    schema = wanted.json if wanted.json is not None else {"type": "object"}
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})


def _field(wanted: StructuredOutputsParams) -> tuple[str, str]:
    """The field that is set and its value, cut for a message."""
    field = next(name for name in ("json", "regex", "choice", "grammar", "json_object") if getattr(wanted, name))
    text = str(getattr(wanted, field))
    return field, text if len(text) <= 80 else f"{text[:79]}…"


def _reason(error: str) -> str:
    """One line of llguidance's message: the regex parser's verdict where there is one, else the first line."""
    text = error.split("\n<state>")[0].split("\n<grammar>")[0]
    verdict = re.search(r"^error: (.+)$", text, re.MULTILINE)
    line = verdict[1] if verdict else text.strip().partition("\n")[0]
    if line in ("NoExtension", "NoExtensionBias"):
        return "no text of the model's tokens matches it"
    return re.sub(r"^at \d+\(\d+\): ", "", line)[:300] or "llguidance refuses it"
