"""The attention backend 'flash-attn': the library's varlen forward over our paged cache. Imports it when first used.

It takes head widths 64 and 128, bfloat16 and float16, and cache blocks of a multiple of 256 tokens; no masks per row.

Shapes: T query tokens, S sequences, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels.attention_torch import HeadGroups

HEAD_DIMS = (64, 128)
PAGE = 256


@dataclass(frozen=True, slots=True)
class FlashMetadata:
    """What the layers of one forward share; the tensors are int32 on the device but for the slots.

    Attributes:
        query_start_S1, key_start_S1: offsets of the sequences' query tokens, and running sums of their context lengths.
        max_query_len, max_context_len: over the sequences.
    """

    groups: HeadGroups
    query_start_S1: torch.Tensor
    key_start_S1: torch.Tensor
    block_tables_SB: torch.Tensor
    slots_T: torch.Tensor
    max_query_len: int
    max_context_len: int


class FlashAttention:
    """The backend named 'flash-attn' (see ``AttentionBackend``)."""

    name = "flash-attn"

    def __init__(self) -> None:
        self._groups: dict[tuple[tuple[int, ...], torch.device], HeadGroups] = {}

    def prepare(
        self, batch: ForwardBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> FlashMetadata:
        """See ``AttentionBackend``.

        Raises:
            ConfigError: the cache's blocks or the type don't suit the library.
        """
        device = batch.token_ids_T.device
        groups = self._checked_groups(block_size, q_to_kv, dtype, device)
        key_start = [0]
        for length in batch.context_lens:
            key_start.append(key_start[-1] + length)
        facts = torch.tensor((batch.query_start, key_start), dtype=torch.int32)
        if device.type == "cuda":
            facts = facts.pin_memory().to(device, non_blocking=True)
        return FlashMetadata(
            groups,
            facts[0],
            facts[1],
            batch.block_tables_SB.int(),
            batch.slots_T,
            max(b - a for a, b in pairwise(batch.query_start)),
            max(batch.context_lens),
        )

    def prepare_static(
        self, batch: StaticBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> FlashMetadata:
        """See ``AttentionBackend``.

        With one query token at most the library would take row i for sequence i's, so that only the last sequences
        could be padding: it is told of two.

        Raises:
            ConfigError: the cache's blocks or the type don't suit the library.
        """
        lengths_S = batch.context_lens_S
        key_start_S1 = torch.zeros(len(lengths_S) + 1, dtype=torch.int32, device=lengths_S.device)
        torch.cumsum(lengths_S, 0, dtype=torch.int32, out=key_start_S1[1:])
        return FlashMetadata(
            self._checked_groups(block_size, q_to_kv, dtype, lengths_S.device),
            batch.query_start_S1,
            key_start_S1,
            batch.block_tables_SB.int(),
            batch.slots_T,
            max(batch.max_query_len, 2),
            batch.max_context_len,
        )

    def _checked_groups(
        self, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> HeadGroups:
        if block_size % PAGE != 0 or dtype not in (torch.bfloat16, torch.float16):
            allowed = f"it takes bfloat16 and float16, and cache blocks of a multiple of {PAGE} tokens"
            raise ConfigError("attention_backend", "flash-attn", f"{allowed}; use 'triton'")
        key = (tuple(q_to_kv), device)
        if key not in self._groups:
            self._groups[key] = HeadGroups.make(*key)
        return self._groups[key]

    def store_kv(
        self,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: FlashMetadata,
    ) -> None:
        """See ``AttentionBackend``."""
        from pearl_ray.kernels.kv_store import store_kv

        store_kv(k_TGD, v_TGD, k_cache, v_cache, metadata.slots_T)

    def paged_attention(
        self, q_THD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: FlashMetadata
    ) -> torch.Tensor:
        """See ``AttentionBackend``. Scale ``D ** -0.5``; causal from the lower right corner."""
        from flash_attn import flash_attn_varlen_func

        if q_THD.shape[2] not in HEAD_DIMS:
            allowed = f"head widths are {HEAD_DIMS}, not {q_THD.shape[2]}"
            raise ConfigError("attention_backend", "flash-attn", f"{allowed}; use 'triton'")
        groups = metadata.groups
        out: torch.Tensor = flash_attn_varlen_func(
            q_THD if groups.pad is None else q_THD.index_select(1, groups.pad),
            k_cache,
            v_cache,
            cu_seqlens_q=metadata.query_start_S1,
            cu_seqlens_k=metadata.key_start_S1,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_context_len,
            causal=True,
            block_table=metadata.block_tables_SB,
        )
        return out if groups.unpad is None else out.index_select(1, groups.unpad)
