"""What a load asks: prompts of a file, or random ones, and the model's name. Knows httpx; measures nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pearl_ray.commands.load import CONNECT_TIMEOUT_S, BadAnswerError, Target, decoded, error_text

WORDS_PER_TOKEN = 1.5  # more than any tokenizer needs for such words; what is too much is cut off
_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")


def read_prompts(path: Path) -> list[str]:
    """Texts of a file of JSON lines, each with ``prompt``, or with ``turns``, of which the first is taken.

    Raises:
        ValueError: a line is something else, or there is none; says which.
        OSError: it can't be read.
    """
    prompts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["turns"][0] if "turns" in record else record["prompt"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str) or not text:
            raise ValueError(f'line {number} is no JSON object with "turns" (a list of texts) or "prompt" (a text)')
        prompts.append(text)
    if not prompts:
        raise ValueError("it has no line")
    return prompts


async def first_model(client: httpx.AsyncClient) -> str:
    """What the server calls its first model.

    Raises:
        BadAnswerError: it doesn't say.
        httpx.HTTPError: it can't be reached.
    """
    response = await client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
    if response.status_code != 200:
        raise BadAnswerError(await error_text(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise BadAnswerError("/v1/models names no model") from None


async def random_prompts(
    client: httpx.AsyncClient, target: Target, count: int, num_tokens: int, generator: np.random.Generator
) -> list[str | list[int]]:
    """Prompts of random words, cut to ``num_tokens`` by the server's own ``/tokenize`` (vLLM's and ours).

    For completions they are token ids, exactly as many; for chat they are text, and the template adds to it.

    Raises:
        BadAnswerError: the server can't tokenise.
    """
    prompts: list[str | list[int]] = []
    for _ in range(count):
        picks = generator.integers(len(_SYLLABLES), size=(math.ceil(num_tokens * WORDS_PER_TOKEN) + 4, 3))
        text = " ".join("".join(_SYLLABLES[i] for i in word) for word in picks)
        made = await _post(client, "/tokenize", {"model": target.model, "prompt": text, "add_special_tokens": False})
        ids = made.get("tokens")
        if not isinstance(ids, list) or len(ids) < num_tokens:
            raise BadAnswerError("/tokenize gave too few tokens")
        if target.endpoint == "completions":
            prompts.append(ids[:num_tokens])
        else:
            cut = await _post(client, "/detokenize", {"model": target.model, "tokens": ids[:num_tokens]})
            prompts.append(str(cut.get("prompt")))
    return prompts


async def _post(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body, timeout=CONNECT_TIMEOUT_S)
    if response.status_code != 200:
        raise BadAnswerError(f"{path}: {await error_text(response)}")
    return decoded(response.text)
