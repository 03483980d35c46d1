"""Which attention backend a GPU gets, what each refuses, and flash-attn over our cache against float32."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("triton")

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels.backend import choose_attention
from tests.kernel_checks import DEVICE, INTERPRETING, REASON, PagedCase, relative_error

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
can_run = torch.cuda.is_available() and not INTERPRETING
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not can_run, reason=REASON)]


def name_of(name: str = "auto", head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, block_size: int = 256) -> str:
    return choose_attention(name, "cuda", head_dim=head_dim, dtype=dtype, block_size=block_size).name


def test_auto_takes_the_fastest_that_is_able() -> None:
    assert name_of() == ("flash-attn" if HAS_FLASH else "triton")
    assert name_of(block_size=16) == name_of(head_dim=96) == "triton"
    assert name_of(dtype=torch.float32) == name_of(head_dim=72) == "torch"
    assert choose_attention("auto", "cuda").name == "triton"
    assert choose_attention("auto", "cpu").name == "torch"


def test_a_deterministic_engine_gets_triton_and_flash_attn_is_refused() -> None:
    facts = {"head_dim": 128, "dtype": torch.bfloat16, "block_size": 256, "deterministic": True}
    assert choose_attention("auto", "cuda", **facts).name == "triton"
    if HAS_FLASH:
        with pytest.raises(ConfigError, match=r"depend on the batch.*'triton'"):
            choose_attention("flash-attn", "cuda", **facts)


def test_what_a_backend_cannot_do_is_refused_with_what_can() -> None:
    with pytest.raises(ConfigError, match=r"float32; use 'torch'"):
        name_of("triton", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"head widths.*72; use 'torch'"):
        name_of("triton", head_dim=72)
    with pytest.raises(ConfigError, match="unknown"):
        name_of("nonsense")
    if not HAS_FLASH:
        with pytest.raises(ConfigError, match="not available"):
            name_of("flash-attn")
        return
    for problem in ({"block_size": 16}, {"head_dim": 80}, {"dtype": torch.float32}):
        with pytest.raises(ConfigError, match="flash-attn"):
            name_of("flash-attn", **problem)  # type: ignore[arg-type]


@pytest.mark.skipif(not HAS_FLASH, reason="needs flash-attn")
@pytest.mark.parametrize("q_to_kv", [(0, 0, 0, 1, 1, 1), (0, 1, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_flash_attention_over_our_cache_is_right(width: int, q_to_kv: tuple[int, ...]) -> None:
    sequences = [(1, 5), (8, 900), (4, 23), (1, 1), (300, 700)]
    case = PagedCase(sequences, q_to_kv, width=width, block_size=256, dtype=torch.bfloat16)
    case.cache.nan_to_num_(nan=1e3)  # the library multiplies what lies behind a sequence by zero
    batch = ForwardBatch(
        token_ids_T=torch.zeros(len(case.q), dtype=torch.int64, device=DEVICE),
        positions_T=torch.zeros(len(case.q), dtype=torch.int64, device=DEVICE),
        slots_T=case.slots,
        query_start=tuple(case.query_start),
        context_lens=tuple(case.context_lens),
        block_tables_SB=case.tables,
        output_rows_R=torch.arange(len(case.q), device=DEVICE),
    )
    backend = choose_attention("flash-attn", DEVICE)
    metadata = backend.prepare(batch, block_size=256, q_to_kv=case.q_to_kv, dtype=torch.bfloat16)
    backend.store_kv(case.new[0], case.new[1], case.cache[0], case.cache[1], metadata)
    out = backend.paged_attention(case.q, case.cache[0], case.cache[1], metadata)
    assert relative_error(out, case.expected()) < 8e-3


@pytest.mark.skipif(not HAS_FLASH, reason="needs flash-attn")
@pytest.mark.parametrize("counts", [(1, 0, 1, 1), (3, 0, 8, 1)], ids=str)
def test_flash_attention_from_device_tensors_skips_padding_wherever_it_stands(counts: tuple[int, ...]) -> None:
    lengths = [900, 5, 23, 300]
    real = [(count, length) for count, length in zip(counts, lengths, strict=True) if count]
    case = PagedCase(real, (0, 0, 0, 1, 1, 1), width=64, block_size=256, dtype=torch.bfloat16)
    case.cache.nan_to_num_(nan=1e3)
    tables = torch.zeros(len(counts), case.tables.shape[1], dtype=torch.int32, device=DEVICE)
    tables[[seq for seq, count in enumerate(counts) if count]] = case.tables.int()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    rows = torch.zeros(len(case.q) + 3, dtype=torch.int64, device=DEVICE)
    batch = StaticBatch(
        rows,
        rows,
        torch.nn.functional.pad(case.slots, (0, 3), value=-1),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        tables,
        None,
        max_query_len=max(counts),
        max_context_len=2048,
    )
    backend = choose_attention("flash-attn", DEVICE)
    metadata = backend.prepare_static(batch, block_size=256, q_to_kv=case.q_to_kv, dtype=torch.bfloat16)
    q = torch.nn.functional.pad(case.q, (0, 0, 0, 0, 0, 3))
    new = torch.nn.functional.pad(case.new, (0, 0, 0, 0, 0, 3))
    backend.store_kv(new[0], new[1], case.cache[0], case.cache[1], metadata)
    out = backend.paged_attention(q, case.cache[0], case.cache[1], metadata)
    assert relative_error(out[: len(case.q)], case.expected()) < 8e-3
