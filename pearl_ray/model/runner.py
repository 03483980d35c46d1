"""A model with its cache: entries in, logits out. Knows nothing of rounds, verdicts or requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl_ray.core.comm import Group
from pearl_ray.model.batching import Entry, make_batch
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.transformer import Transformer


class ModelRunner:
    """One rank of a model.

    Attributes:
        vocab_sizes: logits per rank of the group; their sum is the model's (padded) vocabulary.
        num_valid: ids from here on are padding or unknown to the other model, and are never chosen.
    """

    def __init__(self, model: Transformer, cache: KVCache, group: Group, *, block_size: int, num_valid: int) -> None:
        self.group = group
        self.vocab_sizes = model.vocab_sizes
        self.num_valid = num_valid
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._device = model.device

    def logits(self, entries: Sequence[Entry]) -> torch.Tensor | None:
        """Feed the entries; this rank's logits ``[R, V_local]`` of their output rows, None where there are no rows."""
        if not entries:
            return None
        batch = make_batch(entries, self._block_size, self._device)
        hidden_RD = self._model.forward(batch, self._cache)
        if batch.output_rows_R.numel() == 0:
            return None
        return self._model.local_logits(hidden_RD)
