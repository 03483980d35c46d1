"""The attention backends: what one must do, and which one a device gets. Imports an implementation only when chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar, cast

import torch

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.errors import ConfigError

Metadata = TypeVar("Metadata")

NAMES = ("auto", "flash-attn", "triton", "torch")


class AttentionBackend(Protocol, Generic[Metadata]):
    """Paged attention over one rank's heads.

    Shapes: T query tokens, H local query heads, G local KV heads, D head width; caches are
    ``[num_blocks, block_size, G, D]`` (see ``KVCache``).
    """

    name: str

    def prepare(self, batch: ForwardBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype) -> Metadata:
        """What all layers of one forward share; ``q_to_kv`` gives each local query head its local KV head."""

    def prepare_static(
        self, batch: StaticBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> Metadata:
        """:meth:`prepare` of a batch on the device: no wait for it and no copy to it (but for 'torch').

        The first call for a ``q_to_kv`` makes constants, so the pass runs once before it is captured in a graph.
        """

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


def choose_attention(
    name: str,
    device: torch.device | str,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    deterministic: bool = False,
) -> AttentionBackend[object]:
    """The backend called ``name`` ('auto': the fastest that ``device`` has and that can do what is asked).

    Args:
        head_dim, dtype, block_size: the model's and its cache's, where known: what a backend can't do is refused here
            rather than in the first forward. 'auto' takes flash-attn only if it knows all three.
        deterministic: a row's result mustn't depend, to the last bit, on the rest of the batch; not with flash-attn.

    Raises:
        ConfigError: the name is unknown, or that backend isn't there for this device, or can't do what is asked.
    """
    on_gpu = torch.device(device).type == "cuda"
    available = ("torch", *(("triton",) if on_gpu and _is_installed("triton") else ()))
    available += ("flash-attn",) if on_gpu and _is_installed("flash_attn") else ()
    if name not in ("auto", *available):
        possible = " or ".join(repr(n) for n in ("auto", *available))
        why = "unknown" if name not in NAMES else f"not available on device '{torch.device(device).type}' here"
        raise ConfigError("attention_backend", name, f"{why}; use {possible}")
    obstacles = {n: _obstacle(n, head_dim, dtype, block_size, deterministic) for n in available}
    if name == "auto":
        is_known = None not in (head_dim, dtype, block_size)
        fastest_first = (*(("flash-attn",) if is_known else ()), "triton", "torch")
        name = next(n for n in fastest_first if n in available and obstacles[n] is None)
    elif obstacles[name] is not None:
        able = " or ".join(repr(n) for n in available if obstacles[n] is None)
        raise ConfigError("attention_backend", name, f"{obstacles[name]}; use {able}")
    # Metadata is opaque to the caller: what prepare() returns goes back to the same backend.
    return cast(AttentionBackend[object], _make(name, deterministic))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _obstacle(
    name: str, head_dim: int | None, dtype: torch.dtype | None, block_size: int | None, deterministic: bool
) -> str | None:
    """Why this backend can't, as far as is known; None if nothing speaks against it."""
    if name == "torch":
        return None
    if name == "flash-attn" and deterministic:
        return "its results depend on the batch, and 'deterministic' is asked for"
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    widths = (64, 128) if name == "flash-attn" else (64, 80, 96, 128, 256)
    if head_dim is not None and head_dim not in widths:
        return f"its head widths are {', '.join(map(str, widths))}, not {head_dim}"
    if name == "flash-attn" and block_size is not None and block_size % 256 != 0:
        return f"its cache blocks are multiples of 256 tokens, not {block_size}"
    return None


def _make(name: str, deterministic: bool) -> object:
    if name == "flash-attn":
        from pearl_ray.kernels.attention_flash import FlashAttention

        return FlashAttention()
    if name == "triton":
        from pearl_ray.kernels.attention_triton import TritonAttention

        return TritonAttention(deterministic=deterministic)
    from pearl_ray.kernels.attention_torch import TorchAttention

    return TorchAttention(deterministic=deterministic)
