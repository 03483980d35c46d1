"""The attention backends: what one must do, and which one a device gets. Imports an implementation only when chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar, cast

import torch

from pearl_ray.core.batch import ForwardBatch
from pearl_ray.core.errors import ConfigError

Metadata = TypeVar("Metadata")

AVAILABLE = ("torch",)
NAMES = ("auto", "flash-attn", "triton", "torch")


class AttentionBackend(Protocol, Generic[Metadata]):
    """Paged attention over one rank's heads.

    Shapes: T query tokens, H local query heads, G local KV heads, D head width; caches are
    ``[num_blocks, block_size, G, D]`` (see ``KVCache``).
    """

    name: str

    def prepare(self, batch: ForwardBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype) -> Metadata:
        """What all layers of one forward share; ``q_to_kv`` gives each local query head its local KV head."""

    def store_kv(
        self,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: Metadata,
    ) -> None:
        """Writes the batch's keys and values to their slots; slot -1 writes nothing."""

    def paged_attention(
        self, q_THD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: Metadata
    ) -> torch.Tensor:
        """Causal attention of every query token to its own sequence up to its own position, ``[T, H, D]``."""


def choose_attention(name: str, device: torch.device | str) -> AttentionBackend[object]:
    """The backend called ``name`` ('auto': the fastest that ``device`` has).

    Raises:
        ConfigError: the name is unknown, or that backend isn't there for this device.
    """
    if name not in ("auto", *AVAILABLE):
        possible = " or ".join(repr(n) for n in ("auto", *AVAILABLE))
        why = "unknown" if name not in NAMES else f"not available on device '{torch.device(device).type}' here"
        raise ConfigError("attention_backend", name, f"{why}; use {possible}")
    from pearl_ray.kernels.attention_torch import TorchAttention

    # Metadata is opaque to the caller: what prepare() returns goes back to the same backend.
    return cast(AttentionBackend[object], TorchAttention())
