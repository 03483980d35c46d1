"""Whether a draft and a target speak of the same tokens. Compares tokenizers; knows neither weights nor files.

Verification keeps the target's distribution whatever the draft proposes, so a mismatch costs acceptance and never
correctness; it is refused because such a draft would only slow the target down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pearl_ray.core.errors import VocabularyMismatchError


class HasTokens(Protocol):
    """A tokenizer, as far as it is compared: each id's token, None for an id not in use."""

    @property
    def tokens(self) -> Sequence[str | None]: ...


def check_vocabularies(target: HasTokens, draft: HasTokens, *, target_vocab_size: int, draft_vocab_size: int) -> int:
    """Compare two tokenizers id by id, up to where the shorter ends; models may be padded beyond either.

    Args:
        target_vocab_size, draft_vocab_size: rows of the models' embeddings, padding included.

    Returns:
        The number of ids that the draft may propose: those below it are the same tokens in both.

    Raises:
        VocabularyMismatchError: an id stands for different tokens, or the draft has no embedding for one of the
            target's tokens; says which id is the first.
    """
    for token_id, (ours, theirs) in enumerate(zip(target.tokens, draft.tokens, strict=False)):
        if ours is not None and theirs is not None and ours != theirs:
            raise VocabularyMismatchError(
                f"draft and target don't share a vocabulary: token {token_id} is {ours!r} in the target and {theirs!r} "
                "in the draft; use a draft with the target's tokenizer"
            )
    if draft_vocab_size < len(target.tokens):
        raise VocabularyMismatchError(
            f"the target's token {draft_vocab_size} ({target.tokens[draft_vocab_size]!r}) is beyond the draft's "
            f"vocabulary of {draft_vocab_size}; use a draft with the target's tokenizer"
        )
    return min(len(target.tokens), len(draft.tokens), target_vocab_size, draft_vocab_size)
