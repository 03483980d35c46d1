"""What clients send, made ready for the controller: texts and conversations become ids, grammars are tried once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pearl_ray.core.errors import ConfigError
from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
from pearl_ray.model.grammar import GrammarCompiler
from pearl_ray.model.tokenizer import Tokenizer

Prompt = str | Sequence[int]
LONG_PROMPT_CHARS = 20_000  # longer texts are tokenised in a thread, so that rounds don't wait for their diffs


class Intake:
    """``num_valid``: ids below it exist."""

    def __init__(self, tokenizer: Tokenizer, num_valid: int) -> None:
        self.tokenizer = tokenizer
        self._num_valid = num_valid
        self._grammars: GrammarCompiler | None = None

    async def encode(self, prompt: Prompt | Sequence[Mapping[str, object]]) -> tuple[str | None, list[int]]:
        """The prompt's text (None for token ids) and its ids; a conversation goes through the chat template.

        Raises:
            ConfigError: neither a text, nor token ids, nor messages.
            RequestRefusedError: the template refuses the messages.
        """
        if isinstance(prompt, str):
            if len(prompt) > LONG_PROMPT_CHARS:
                return prompt, await asyncio.to_thread(self.tokenizer.encode, prompt)
            return prompt, self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            text = self.tokenizer.apply_chat_template(cast("Sequence[Mapping[str, Any]]", list(prompt)))
            return text, await asyncio.to_thread(self.tokenizer.encode, text, False)
        try:
            return None, [int(token) for token in prompt]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ConfigError("prompt", prompt, "a text, a list of token ids, or a list of chat messages") from None

    async def check(self, params: Sequence[SamplingParams]) -> None:
        """Compile each grammar once, so that a bad one is refused before a shard meets it.

        Raises:
            ConfigError, RequestRefusedError: what is wrong with it.
        """
        for wanted in {p.structured_outputs for p in params if p.structured_outputs is not None}:
            await asyncio.to_thread(self._try, wanted)

    def _try(self, wanted: StructuredOutputsParams) -> None:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self._num_valid)
        self._grammars.check(wanted)
