"""The paged KV cache of one rank: tensors and their size. Knows neither sequences nor who owns a block.

Which positions of a block are valid is a matter of lengths held elsewhere (``core``): truncating a sequence moves its
length back and touches nothing here, and later writes overwrite what lies behind it. Nothing is ever cleared.
"""

from __future__ import annotations

import math

import numpy as np
import torch


class KVCache:
    """Keys and values of all layers.

    Attributes:
        k, v: per layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, the layout of flash-attn's paged cache;
            position p of a sequence lives in block ``table[p // block_size]`` at offset ``p % block_size``.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (2, num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self._storage = _zeros(shape, dtype, torch.device(device))
        self.k = tuple(self._storage[0])
        self.v = tuple(self._storage[1])

    @staticmethod
    def bytes_per_block(block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values together."""
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU, pages that take memory only once they are written (calloc, which torch.zeros doesn't use)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
