"""From a body's prompt or messages to token ids, checked against the model before the engine hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from pearl_ray.core.params import SamplingParams
from pearl_ray.serving.backend import Model, Tokenizer
from pearl_ray.serving.errors import ApiError

SHORT_CHARS = 2_000  # shorter texts are tokenised at once: a thread costs more

# Names of Hugging Face's `apply_chat_template` itself; the template's own variables are all others.
_TEMPLATE_ARGUMENTS = frozenset(
    [
        "self",
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)


def encode_now(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        ApiError: (400) it has a lone surrogate, which JSON can hold and UTF-8 can't.
    """
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ApiError(400, "the text has half of a surrogate pair, which is no character", code="invalid_value")
    return tokenizer.encode(text, add_special_tokens)


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text; of a long one in a thread, so that other streams don't wait."""
    if len(text) <= SHORT_CHARS:
        return encode_now(tokenizer, text, add_special_tokens)
    return await asyncio.to_thread(encode_now, tokenizer, text, add_special_tokens)


async def encode_prompts(
    tokenizer: Tokenizer,
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    add_special_tokens: bool,
) -> list[list[int]]:
    """One list of ids per prompt: of a text, several texts, a list of ids, or several such lists."""
    if isinstance(prompt, str):
        return [await encode(tokenizer, prompt, add_special_tokens)]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    encoded = []
    for one in prompt:
        ids = await encode(tokenizer, one, add_special_tokens) if isinstance(one, str) else list(one)  # type: ignore[arg-type]
        encoded.append(ids)
    return encoded


def texts_of_prompts(
    tokenizer: Tokenizer, prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
) -> list[str]:
    """The prompts as they are echoed: a text as it came, ids as the text that they spell, special tokens included."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [tokenizer.decode(prompt, False)]  # type: ignore[arg-type]
    return [one if isinstance(one, str) else tokenizer.decode(one, False) for one in prompt]  # type: ignore[arg-type]


async def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    template_args: Mapping[str, Any] | None,
) -> str:
    """The conversation as the prompt text that the model was trained on; messages as ``tools.for_template`` makes them.

    Raises:
        ApiError, RequestRefusedError: the messages or the arguments can't be honoured.
    """
    bad = sorted(_TEMPLATE_ARGUMENTS & (template_args or {}).keys())
    if bad:
        raise ApiError(
            400,
            f"chat_template_kwargs may hold variables of the template, and {bad[0]!r} is none",
            param="chat_template_kwargs",
            code="invalid_value",
        )

    def render() -> str:
        return tokenizer.apply_chat_template(
            messages, tools, add_generation_prompt=add_generation_prompt, **dict(template_args or {})
        )

    if not tools and sum(len(message["content"]) for message in messages) <= SHORT_CHARS:
        return render()
    return await asyncio.to_thread(render)


def check_against_model(
    model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams, param: str, max_choices: int
) -> None:
    """Refuse with 400 what would reach beyond the model: too many, empty or too long prompts, ids it doesn't have."""
    if not prompts or not all(prompts):
        raise ApiError(400, f"{param} is empty; give at least one token", param=param, code="invalid_value")
    if len(prompts) * params.n > max_choices:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n={params.n} are more than {max_choices} answers in one request",
            param="n" if len(prompts) == 1 else param,
            code="invalid_value",
        )
    longest = max(map(len, prompts))
    if longest >= model.max_model_len:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens, and the model's context of {model.max_model_len} must hold at least one "
            "more for the answer",
            param=param,
            code="context_length_exceeded",
        )
    vocab_size = model.tokenizer.vocab_size
    for name, ids in (
        (param, [max(prompt) for prompt in prompts]),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(params.logit_bias)),
    ):
        check_ids(name, ids, vocab_size)


def check_ids(param: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise ``ApiError`` (400) for a token id that the vocabulary doesn't have."""
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise ApiError(
            400,
            f"{param}: token {highest} is outside the vocabulary of {vocab_size} tokens",
            param=param,
            code="invalid_value",
        )
