"""The noise of ``core.rng`` inside a kernel: Philox4x32-10 and the Gumbel recipe, bit for bit. Knows no logits.

Bits hold only where each product and each sum is rounded by itself: launch with ``enable_fp_fusion=False``. Counters
are 32-bit words throughout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.core import rng

_M0, _M1 = tl.constexpr(rng.PHILOX_M0), tl.constexpr(rng.PHILOX_M1)
_W0, _W1 = tl.constexpr(rng.PHILOX_W0), tl.constexpr(rng.PHILOX_W1)
_HIGH_WORD = tl.constexpr(rng.HIGH_WORD)
_SQRT_HALF_BITS = tl.constexpr(rng.SQRT_HALF_BITS)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8 = (tl.constexpr(c) for c in rng.LOG_COEFFICIENTS)
_LN2_HIGH, _LN2_LOW = tl.constexpr(rng.LN2_HIGH), tl.constexpr(rng.LN2_LOW)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four words per counter; ``seed`` int64, the counter words uint32, all of one shape or scalars."""
    key_lo = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_hi = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        # One wide product gives both halves; a 32-bit umulhi would be a second multiplication.
        product0 = c0.to(tl.uint64) * _M0
        product1 = c2.to(tl.uint64) * _M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key_lo
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key_hi
        c1 = (product1 & 0xFFFFFFFF).to(tl.uint32)
        c3 = (product0 & 0xFFFFFFFF).to(tl.uint32)
        key_lo = (key_lo.to(tl.uint64) + _W0 & 0xFFFFFFFF).to(tl.uint32)
        key_hi = (key_hi.to(tl.uint64) + _W1 & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _split(x):
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    return f, e


@triton.jit
def _log1p_poly(k, f):
    y = f * _C0 + _C1
    y = y * f + _C2
    y = y * f + _C3
    y = y * f + _C4
    y = y * f + _C5
    y = y * f + _C6
    y = y * f + _C7
    y = y * f + _C8
    z = f * f
    y = y * f * z + k * _LN2_LOW
    y = y - z * 0.5
    return y + f + k * _LN2_HIGH


@triton.jit
def log(x):
    """``rng.log``: of positive, normal float32 numbers."""
    f, e = _split(x)
    return _log1p_poly(e.to(tl.float32), f)


@triton.jit
def gumbel_of(word):
    """Gumbel noise of uint32 words."""
    high = word >= _HIGH_WORD
    small = tl.where(high, word ^ 0xFFFFFFFF, word).to(tl.float32)
    b = (small + 0.5) * 2.3283064365386963e-10
    f, e = _split(b)
    exponential = -_log1p_poly(tl.where(high, e, 0).to(tl.float32), tl.where(high, f, -b))
    return -log(exponential)


@triton.jit
def block_gumbel(seed, position, sample, PURPOSE: tl.constexpr, first, BLOCK: tl.constexpr):
    """Noise of ids ``first … first + BLOCK - 1``; ``first`` is a multiple of 4."""
    quad = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quad * 0
    w0, w1, w2, w3 = philox(
        seed, quad, zero + position.to(tl.uint32), zero + sample.to(tl.uint32), zero + tl.full((), PURPOSE, tl.uint32)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [quad, a, b] is word 2 a + b
    return gumbel_of(tl.reshape(words, (BLOCK,)))


@triton.jit
def gumbel_at(seed, position, sample, PURPOSE: tl.constexpr, ids):
    """Noise of single ids (int32, any shape)."""
    word = word_at(seed, position, sample, PURPOSE, ids)
    return gumbel_of(word)


@triton.jit
def word_at(seed, position, sample, PURPOSE: tl.constexpr, ids):
    """The 32-bit word of single ids."""
    quad = (ids // 4).to(tl.uint32)
    zero = quad * 0
    w0, w1, w2, w3 = philox(
        seed, quad, zero + position.to(tl.uint32), zero + sample.to(tl.uint32), zero + tl.full((), PURPOSE, tl.uint32)
    )
    lane = ids % 4
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def _fill(out, seeds, positions, samples, vocab_start, size, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    first = vocab_start // 4 * 4 + tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK) - vocab_start
    seed, position, sample = tl.load(seeds + row), tl.load(positions + row), tl.load(samples + row)
    noise = block_gumbel(seed, position, sample, PURPOSE, first, BLOCK)
    tl.store(out + row.to(tl.int64) * size + at, noise, mask=(at >= 0) & (at < size))


def gumbel(
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
    samples_R: torch.Tensor,
    purpose: int,
    *,
    vocab_start: int,
    vocab_size: int,
) -> torch.Tensor:
    """``rng.gumbel`` from device tensors (int64 seeds), float32 ``[R, vocab_size]``: what the other kernels draw."""
    out = torch.empty((len(seeds_R), vocab_size), dtype=torch.float32, device=seeds_R.device)
    block = 1024
    _fill[(len(seeds_R), triton.cdiv(vocab_size + 3, block))](
        out, seeds_R, positions_R, samples_R, vocab_start, vocab_size, PURPOSE=purpose, BLOCK=block,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
