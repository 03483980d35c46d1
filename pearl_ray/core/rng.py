"""Counter-based noise. Knows seeds, positions and token ids; knows no logits, keeps no state, stores no number.

Every number is a pure function of (64-bit request seed, position, sample index, purpose, token id): Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = the seed's (low, high) words and
counter = (token id >> 2, position, sample index, purpose); token id's word is number ``id & 3`` of the block. So a
vocabulary slice, a batch, another process or a GPU kernel makes the same numbers.

From a 32-bit word r to Gumbel noise, in float32 with IEEE add and multiply only, no fma, each line rounded once:

1. ``high = r >= 1258425418`` (s = (r + 1/2) 2^-32 >= 0.293); ``c = ~r if high else r``
2. ``b = (float32(c) + 0.5) * 2^-32`` (integer to float rounds to nearest even). b is 1 - s if high, else s: whichever
   of them is the small one, so it is never cancelled, never 0 and never 1.
3. ``(k, f) = split(b)`` if high, else ``(0, -b)``; ``E = -log1p_poly(k, f)``, the exponential variate -log(1 - s)
4. ``g = -log1p_poly(split(E))``, the Gumbel variate -log E, in [-3.13, 22.88]

``split(x)``: ``i = bits(x)``; ``e = (i - 0x3F3504F3) >> 23`` (arithmetic shift; the constant is the bits of sqrt(1/2));
``f = float(i - (e << 23)) - 1``; ``k = float32(e)``. So x = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1).
``log1p_poly(k, f) = k ln 2 + log(1 + f)``: see there for the order of operations.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
HIGH_WORD = 1258425418  # the smallest r with (r + 1/2) 2^-32 >= 0.293
SQRT_HALF_BITS = 0x3F3504F3
# log(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1]: P's coefficients, highest power first, and ln 2 in
# two parts whose first has few bits (S. Moshier, Cephes logf). Each is meant as the float32 nearest to the decimal.
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
GUMBEL_MAX = 22.88  # no noise is larger
LARGE_GUMBEL, LARGE_WORD = 6.0, 10_739_706  # only words below this one, one in 400, make noise of 6 or more

_CHUNK = 1 << 16  # numbers made at a time: the intermediates stay in the cache

_Words = TypeVar("_Words", int, NDArray[Any], torch.Tensor)


class Purpose(IntEnum):
    """What a number is for; the last counter word. Numbers of different purposes are independent."""

    COUPLED = 0  # the race that target and draft share, and every token drawn without a proposal
    DRAFT = 1  # the proposal under `rejection`
    TEST = 2  # the acceptance test under `rejection`
    RESIDUAL = 3  # the replacement after a failed test


def philox4x32(
    key_lo: _Words, key_hi: _Words, c0: _Words, c1: _Words, c2: _Words, c3: _Words
) -> tuple[_Words, _Words, _Words, _Words]:
    """One block of Philox4x32-10 per broadcast element: four 32-bit words.

    Takes 32-bit words held in Python ints, numpy uint64 arrays, or torch int64 tensors (whose products wrap, which
    the masks make harmless). On a CPU numpy is 2 to 3 times as fast as torch here, which emulates the 64-bit product.
    """
    for _ in range(10):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c2 = ((product1 >> 32) & MASK32) ^ c1 ^ key_lo, ((product0 >> 32) & MASK32) ^ c3 ^ key_hi
        c1, c3 = product1 & MASK32, product0 & MASK32
        key_lo, key_hi = (key_lo + PHILOX_W0) & MASK32, (key_hi + PHILOX_W1) & MASK32
    return c0, c1, c2, c3


def gumbel(
    seeds: Sequence[int],
    positions: Sequence[int],
    sample_indices: Sequence[int],
    purpose: int,
    *,
    vocab_start: int,
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Gumbel noise of ids ``vocab_start … vocab_start + vocab_size - 1``, float32 ``[R, vocab_size]``.

    Args:
        seeds, positions, sample_indices: R each; a seed may be any 64-bit integer, signed or unsigned.
        purpose: a :class:`Purpose`.
    """
    out_RV = torch.empty((len(seeds), vocab_size), dtype=torch.float32, device=device)
    rows = max(1, _CHUNK // max(vocab_size, 1))
    for start in range(0, len(seeds), rows):
        at = slice(start, start + rows)
        counters = seeds[at], positions[at], sample_indices[at]
        if out_RV.device.type == "cpu":
            out_RV[at] = gumbel_of_words(words(*counters, purpose, vocab_start=vocab_start, vocab_size=vocab_size))
        else:
            blocks, skip = _blocks(vocab_start, vocab_size)
            arrays = [*_keys(*counters), np.full((1, 1), purpose, np.uint64)]
            key_lo, key_hi, position, sample, last = (torch.from_numpy(a.astype(np.int64)).to(device) for a in arrays)
            on_device = torch.from_numpy(blocks.astype(np.int64)).to(device)
            stacked = torch.stack(philox4x32(key_lo, key_hi, on_device, position, sample, last), dim=-1)
            out_RV[at] = _gumbel_of_torch(stacked.reshape(len(key_lo), -1)[:, skip : skip + vocab_size])
    return out_RV


def words(
    seeds: Sequence[int],
    positions: Sequence[int],
    sample_indices: Sequence[int],
    purpose: int,
    *,
    vocab_start: int,
    vocab_size: int,
) -> NDArray[np.uint32]:
    """The 32-bit words behind :func:`gumbel`, uint32 ``[R, vocab_size]``; small words make large noise."""
    blocks, skip = _blocks(vocab_start, vocab_size)
    key_lo, key_hi, position, sample = _keys(seeds, positions, sample_indices)
    out = np.empty((len(seeds), blocks.shape[1], 4), np.uint32)
    purposes = np.full((1, 1), purpose, np.uint64)
    for i, word in enumerate(philox4x32(key_lo, key_hi, blocks, position, sample, purposes)):
        out[:, :, i] = word
    return out.reshape(len(seeds), -1)[:, skip : skip + vocab_size]


def gumbel_of_words(words: NDArray[np.uint32]) -> torch.Tensor:
    """Words to Gumbel noise, float32 of the same shape: steps 1 to 4 of the module's recipe."""
    high = words >= HIGH_WORD
    small = np.where(high, ~words, words).astype(np.float32)
    return _gumbel_of(torch.from_numpy(small), torch.from_numpy(high))


def gumbel_at(seed: int, position: int, sample_index: int, purpose: int, ids: torch.Tensor) -> torch.Tensor:
    """The noise of these token ids only (any shape); each equals :func:`gumbel`'s."""
    return gumbel_at_rows([seed], [position], [sample_index], purpose, ids.reshape(1, -1)).reshape(ids.shape)


def gumbel_at_rows(
    seeds: Sequence[int], positions: Sequence[int], sample_indices: Sequence[int], purpose: int, ids_RK: torch.Tensor
) -> torch.Tensor:
    """:func:`gumbel_at` for K ids of each of R rows, float32 ``[R, K]``; on a device, the words are made on the CPU."""
    return gumbel_of_words(_words_at(seeds, positions, sample_indices, purpose, ids_RK.cpu().numpy())).to(ids_RK.device)


def gumbel_estimate(seed: int, position: int, sample_index: int, purpose: int, token_id: int) -> float:
    """:func:`gumbel_at` of one id to 1e-6, by the library's logarithm: for bounds only, at a tenth of the time."""
    return -math.log(-math.log1p(-_fraction(seed, position, sample_index, purpose, token_id)))


def uniform(seed: int, position: int, sample_index: int, purpose: int) -> float:
    """(r + 1/2) 2^-32 of token id 0's word r: in (0, 1), exact as a double."""
    return _fraction(seed, position, sample_index, purpose, 0)


def uniforms(
    seeds: Sequence[int], positions: Sequence[int], sample_indices: Sequence[int], purpose: int
) -> NDArray[np.float64]:
    """:func:`uniform` for R rows."""
    word_R1 = _words_at(seeds, positions, sample_indices, purpose, np.zeros((len(seeds), 1), np.int64))
    return (word_R1[:, 0].astype(np.float64) + 0.5) * 2.0**-32


def entropy_seed() -> int:
    """A 64-bit seed from the system, for a request that brings none."""
    return int.from_bytes(os.urandom(8), "little")


def request_seed(engine_seed: int, request_number: int) -> int:
    """A request's 64-bit seed under an engine seed: hashed, so that neighbouring numbers share no noise."""
    text = f"pearl-ray request seed {engine_seed & (2**64 - 1)} {request_number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive, normal float32 numbers, the same bits on every device; within 2 ulp."""
    f, e = _split(x)
    return _log1p_poly(e.to(torch.float32), f)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bits = x.view(torch.int32)
    e = (bits - SQRT_HALF_BITS).bitwise_right_shift_(23)
    f = (bits - (e << 23)).view(torch.float32).sub_(1.0)
    return f, e


def _log1p_poly(k: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """k ln 2 + log(1 + f), in this order, each operation rounded once:

    P by Horner (multiply by f, add the next coefficient); z = f f; y = (P f) z; y += k LN2_LOW; y -= z / 2; y += f;
    y += k LN2_HIGH. (``add`` with torch's alpha of 1 rounds once even if fused; a product is a kernel of its own.)
    """
    y = f * LOG_COEFFICIENTS[0]
    y.add_(LOG_COEFFICIENTS[1])
    for coefficient in LOG_COEFFICIENTS[2:]:
        y.mul_(f).add_(coefficient)
    z = f * f
    y.mul_(f).mul_(z).add_(k * LN2_LOW).sub_(z.mul_(0.5))
    return y.add_(f).add_(k * LN2_HIGH)


def _gumbel_of_torch(words: torch.Tensor) -> torch.Tensor:
    high = words >= HIGH_WORD
    return _gumbel_of(torch.where(high, words ^ MASK32, words).to(torch.float32), high)


def _gumbel_of(small: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Steps 2 to 4 of the module's recipe; ``small`` is float32 of r or of its complement."""
    b = small.add_(0.5).mul_(2.0**-32)
    f, e = _split(b)
    exponential = _log1p_poly(e.mul_(high).to(torch.float32), torch.where(high, f, b.neg_())).neg_()
    return log(exponential).neg_()


def _fraction(seed: int, position: int, sample_index: int, purpose: int, token_id: int) -> float:
    """(r + 1/2) 2^-32 of one token id's word r; on Python ints, which beats arrays of one."""
    key = seed & (2**64 - 1)
    block = philox4x32(key & MASK32, key >> 32, token_id >> 2, int(position), int(sample_index), int(purpose))
    return (block[token_id & 3] + 0.5) * 2.0**-32


def _blocks(vocab_start: int, vocab_size: int) -> tuple[NDArray[Any], int]:
    """The first counter word of every block that holds an id of the slice ``[1, B]``, and where in them it starts."""
    first, last = vocab_start >> 2, (vocab_start + vocab_size + 3) >> 2
    return np.arange(first, last, dtype=np.uint64)[None, :], vocab_start - 4 * first


def _keys(seeds: Sequence[int], positions: Sequence[int], sample_indices: Sequence[int]) -> list[NDArray[Any]]:
    """Key words (low, high), positions and sample indices, uint64 ``[R, 1]`` each."""
    keys = np.array([s & (2**64 - 1) for s in seeds], np.uint64)[:, None]
    return [
        keys & MASK32,
        keys >> 32,
        np.array(positions, np.uint64)[:, None],
        np.array(sample_indices, np.uint64)[:, None],
    ]


def _words_at(
    seeds: Sequence[int],
    positions: Sequence[int],
    sample_indices: Sequence[int],
    purpose: int,
    ids_RK: NDArray[Any],
) -> NDArray[np.uint32]:
    """The 32-bit words of these ids, uint32 ``[R, K]``."""
    key_lo, key_hi, position, sample = _keys(seeds, positions, sample_indices)
    ids = ids_RK.astype(np.uint64)
    blocks = philox4x32(key_lo, key_hi, ids >> 2, position, sample, np.full((1, 1), purpose, np.uint64))
    return np.choose((ids & 3).astype(np.intp), blocks).astype(np.uint32)
