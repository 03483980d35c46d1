"""Log-probabilities that users ask for: of the raw logits, before sampling changes them (vLLM's default)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl_ray.core.messages import TokenLogprobs


def token_logprobs(
    logits_RV: torch.Tensor, tokens: Sequence[int], num_top: int, *, num_valid: int | None = None
) -> list[TokenLogprobs]:
    """The log-probability and rank of one token per row, and the ``num_top`` likeliest ids.

    Args:
        logits_RV: whole rows, any float type; computed in float32 at least.
        tokens: R ids.
        num_valid: ids from here on are padding: they have no probability.
    """
    wide = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))[:, :num_valid]
    logprobs_RV = wide.log_softmax(-1)
    chosen_R = logprobs_RV[torch.arange(len(tokens)), torch.tensor(list(tokens))]
    rank_R = (logprobs_RV > chosen_R[:, None]).sum(-1) + 1
    top = logprobs_RV.topk(num_top, dim=-1) if num_top else None
    return [
        TokenLogprobs(
            token,
            float(chosen_R[i]),
            int(rank_R[i]),
            top.indices[i].tolist() if top is not None else [],
            top.values[i].tolist() if top is not None else [],
        )
        for i, token in enumerate(tokens)
    ]
