"""Prompts for benchmarks: JSON lines with ``turns`` (a list of texts) or ``prompt``, through the chat template."""

from __future__ import annotations

import json
from pathlib import Path

from pearl_ray.model.tokenizer import Tokenizer


def read_prompts(path: Path, count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The first ``count`` prompts of a file as token ids, each the first turn of a conversation."""
    prompts = []
    with path.open() as lines:
        for line in lines:
            record = json.loads(line)
            text = record["turns"][0] if "turns" in record else record["prompt"]
            chat = tokenizer.apply_chat_template([{"role": "user", "content": text}])
            prompts.append(tokenizer.encode(chat, False))
            if len(prompts) == count:
                break
    return prompts
