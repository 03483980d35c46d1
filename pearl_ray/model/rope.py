"""Rotary position embedding: the frequencies of each rope type, and their sines. No model state; turns nothing.

Shapes: T tokens, D head width. Halves are split as Hugging Face does: element i turns with element i + D/2.
"""

from __future__ import annotations

import math

import torch

from pearl_ray.model.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The angle per position of each pair, ``[head_dim / 2]``, computed in ``dtype`` on the CPU.

    'llama3' is the scheme of Llama 3.1: wavelengths beyond ``original / low_freq_factor`` are stretched by ``factor``,
    those below ``original / high_freq_factor`` kept, the ones between interpolated.
    """
    frequencies = 1.0 / (config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype) / head_dim))
    if config.rope_type == "default":
        return frequencies
    if config.rope_type == "linear":
        return frequencies / config.factor
    assert config.rope_type == "llama3"
    original, low, high = config.original_max_position_embeddings, config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / config.factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, between, scaled)


def rope_tables(
    positions_T: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(cos, signed_sin)``, each ``[T, 1, D]`` in ``dtype``; angles are taken in the dtype of ``frequencies``.

    The sine's first half is negated, which saves the rotation (``kernels.ops``) a negation.
    """
    angles = positions_T.to(frequencies.dtype)[:, None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]
