"""The noise: the published generator, the right distribution, finite everywhere, the same from everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pearl_ray.core import rng
from pearl_ray.core.rng import Purpose, gumbel, gumbel_at, philox4x32, uniform

# Random123 1.14.0, tests/kat_vectors: counter, key, expected
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _gumbel_of(words: np.ndarray) -> np.ndarray:
    return rng.gumbel_of_words(words.astype(np.uint32)).numpy()


def _exact(words: np.ndarray) -> np.ndarray:
    return -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32))


def _stratified_words() -> np.ndarray:
    """Both ends and the switch of formulas in full, powers of two, and a fine grid between."""
    near = [np.arange(100_000), 2**32 - 1 - np.arange(100_000), rng.HIGH_WORD + np.arange(-50_000, 50_000)]
    powers = [np.clip(2**k + np.arange(-9, 10), 0, 2**32 - 1) for k in range(32)]
    return np.concatenate([*near, *powers, np.arange(0, 2**32, 9973)]).astype(np.uint64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers_on_ints_arrays_and_tensors(counter, key, expected) -> None:
    assert philox4x32(*key, *counter) == expected
    arrays = philox4x32(*(np.array([w, w], np.uint64) for w in (*key, *counter)))
    assert [a.tolist() for a in arrays] == [[w, w] for w in expected]
    tensors = philox4x32(*(torch.tensor([w, w]) for w in (*key, *counter)))
    assert [t.tolist() for t in tensors] == [[w, w] for w in expected]


def test_every_word_gives_finite_noise_in_the_documented_range() -> None:
    noise = _gumbel_of(_stratified_words())
    assert np.isfinite(noise).all()
    assert -3.13 <= noise.min() < -3.1299
    assert 22.87 < noise.max() < rng.GUMBEL_MAX


def test_only_words_below_the_documented_one_make_large_noise() -> None:
    words = np.concatenate([_stratified_words(), rng.LARGE_WORD + np.arange(-20_000, 20_000)]).astype(np.uint64)
    noise = _gumbel_of(words)
    assert noise[words >= rng.LARGE_WORD].max() < rng.LARGE_GUMBEL
    assert noise[words < rng.LARGE_WORD].min() > rng.LARGE_GUMBEL - 0.02


def test_noise_is_accurate_to_float32_and_falls_as_the_word_grows() -> None:
    words = np.unique(_stratified_words())
    noise, exact = _gumbel_of(words), _exact(words)
    assert np.abs(noise - exact).max() < 1.1e-6
    assert (np.abs(noise - exact) <= 4e-7 * np.maximum(np.abs(exact), 0.5)).all()
    assert (np.diff(noise) <= 5e-7).all()


def test_the_logarithm_is_within_two_ulp_over_all_magnitudes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.exp(torch.rand(200_000, generator=generator) * 160 - 80), torch.linspace(0.5, 2, 200_001)])
    exact = np.log(x.numpy().astype(np.float64))
    ulp = np.spacing(np.abs(exact).astype(np.float32))
    assert (np.abs(rng.log(x).numpy() - exact) <= 2 * ulp).all()


def test_the_tensor_path_gives_the_same_bits_as_the_array_path() -> None:
    words = _stratified_words()
    tensor = rng._gumbel_of_torch(torch.from_numpy(words.astype(np.int64))).numpy()
    assert tensor.tobytes() == _gumbel_of(words).tobytes()


def test_the_recipe_in_single_float32_steps_gives_the_same_bits() -> None:
    """The module's docstring, scalar by scalar: what a kernel has to repeat."""
    f32 = np.float32

    def split(x: np.float32) -> tuple[np.float32, np.float32]:
        bits = int(x.view(np.int32))
        e = (bits - 0x3F3504F3) >> 23
        return f32(e), np.int32(bits - (e << 23)).view(np.float32) - f32(1)

    def log1p_poly(k: np.float32, f: np.float32) -> np.float32:
        y = f32(rng.LOG_COEFFICIENTS[0])
        for c in rng.LOG_COEFFICIENTS[1:]:
            y = y * f + f32(c)
        z = f * f
        y = y * f * z + k * f32(rng.LN2_LOW)
        return (y - z * f32(0.5)) + f + k * f32(rng.LN2_HIGH)

    words = np.random.default_rng(0).choice(_stratified_words(), 2000)
    by_hand = []
    for r in words.tolist():
        high = r >= 1258425418
        b = (f32(0xFFFFFFFF - r if high else r) + f32(0.5)) * f32(2.0**-32)
        k, f = split(b) if high else (f32(0), -b)
        by_hand.append(-log1p_poly(*split(-log1p_poly(k, f))))
    assert np.array(by_hand, np.float32).tobytes() == _gumbel_of(words).tobytes()


def test_noise_is_gumbel_distributed_and_uniforms_uniform() -> None:
    noise = gumbel(range(40), [7] * 40, [0] * 40, Purpose.COUPLED, vocab_start=0, vocab_size=5000).numpy()
    assert stats.kstest(noise.ravel(), stats.gumbel_r.cdf).pvalue > 1e-6
    along_positions = gumbel([3] * 50_000, range(50_000), [0] * 50_000, Purpose.COUPLED, vocab_start=5, vocab_size=1)
    assert stats.kstest(along_positions.numpy().ravel(), stats.gumbel_r.cdf).pvalue > 1e-6
    tests = rng.uniforms([9] * 50_000, range(50_000), [0] * 50_000, Purpose.TEST)
    assert stats.kstest(tests, stats.uniform.cdf).pvalue > 1e-6


def test_noise_is_the_same_from_any_slice_of_the_vocabulary_and_any_batch() -> None:
    seeds, positions, samples = [1, 2**64 - 1, -5], [0, 77, 40_000], [0, 3, 1]
    whole = gumbel(seeds, positions, samples, Purpose.COUPLED, vocab_start=0, vocab_size=1001)
    for start, size in ((0, 1), (1, 3), (3, 6), (255, 250), (500, 501)):
        part = gumbel(seeds, positions, samples, Purpose.COUPLED, vocab_start=start, vocab_size=size)
        assert torch.equal(part, whole[:, start : start + size])
    for i in range(3):
        alone = gumbel(seeds[i : i + 1], positions[i : i + 1], samples[i : i + 1], 0, vocab_start=0, vocab_size=1001)
        assert torch.equal(alone[0], whole[i])
    many = gumbel(seeds * 100, positions * 100, samples * 100, Purpose.COUPLED, vocab_start=0, vocab_size=1001)
    assert torch.equal(many, whole.repeat(100, 1))


def test_noise_at_ids_equals_the_rows_entries_and_the_estimate_is_close() -> None:
    row = gumbel([11], [5], [2], Purpose.DRAFT, vocab_start=0, vocab_size=300)[0]
    ids = torch.tensor([[299, 0, 17], [4, 4, 255]])
    assert torch.equal(gumbel_at(11, 5, 2, Purpose.DRAFT, ids), row[ids])
    estimates = [rng.gumbel_estimate(11, 5, 2, Purpose.DRAFT, v) for v in range(300)]
    assert np.abs(np.array(estimates) - row.numpy()).max() < 1e-6


def test_a_uniform_is_the_word_of_token_zero() -> None:
    u = uniform(2**63 + 12345, 99, 4, Purpose.TEST)
    key = 2**63 + 12345
    word = philox4x32(key & rng.MASK32, key >> 32, 0, 99, 4, int(Purpose.TEST))[0]
    assert u == (word + 0.5) * 2.0**-32
    assert rng.uniforms([key], [99], [4], Purpose.TEST).tolist() == [u]


def test_seed_position_sample_and_purpose_all_change_the_noise() -> None:
    variants = [
        (1, 2, 3, 0),
        (2, 2, 3, 0),
        (1 + 2**32, 2, 3, 0),
        (1, 3, 3, 0),
        (1, 2, 4, 0),
        (1, 2, 3, 1),
        (1, 2, 3, 3),
    ]
    ids = torch.arange(64)
    noises = torch.stack([gumbel_at(*v, ids) for v in variants])
    assert len(torch.unique(noises)) == noises.numel()


def test_a_negative_seed_is_its_unsigned_twin() -> None:
    ids = torch.arange(8)
    assert torch.equal(gumbel_at(-1, 0, 0, 0, ids), gumbel_at(2**64 - 1, 0, 0, 0, ids))


def test_request_seeds_are_stable_distinct_and_64_bit() -> None:
    seeds = {rng.request_seed(e, n) for e in range(30) for n in range(30)}
    assert len(seeds) == 900 and all(0 <= s < 2**64 for s in seeds)
    assert rng.request_seed(0, 0) == rng.request_seed(0, 0) == 17214666205637328589
    assert rng.entropy_seed() != rng.entropy_seed()
