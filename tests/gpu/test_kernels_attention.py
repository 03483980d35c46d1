"""Paged attention by Triton against float32: every head width, odd sizes, splits, masks, and nothing foreign read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from pearl_ray.core.batch import ForwardBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels.attention_triton import Plan, TritonAttention, TritonMetadata
from tests.kernel_checks import CAN_RUN, DEVICE, INTERPRETING, REASON, PagedCase, fresh, poisoned, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

EVEN, UNEVEN, SINGLE, PLAIN = (0, 0, 0, 1, 1, 1), (0, 1, 1, 1, 2, 2), (0,) * 5, (0, 1)
LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
LONG = 700 if INTERPRETING else 5000
DTYPES = [torch.float16] if INTERPRETING else [torch.float16, torch.bfloat16]


def prepared(case: PagedCase, backend: TritonAttention) -> TritonMetadata:
    batch = ForwardBatch(
        token_ids_T=torch.zeros(len(case.q), dtype=torch.int64, device=DEVICE),
        positions_T=torch.zeros(len(case.q), dtype=torch.int64, device=DEVICE),
        slots_T=case.slots,
        query_start=tuple(case.query_start),
        context_lens=tuple(case.context_lens),
        block_tables_SB=case.tables,
        output_rows_R=torch.arange(len(case.q), device=DEVICE),
    )
    return backend.prepare(batch, block_size=case.block_size, q_to_kv=case.q_to_kv, dtype=case.q.dtype)


def run(case: PagedCase, plan: Plan | None = None, **changes: object) -> torch.Tensor:
    backend = TritonAttention()
    metadata = dataclasses.replace(prepared(case, backend), **changes)  # type: ignore[arg-type]
    backend.store_kv(case.new[0], case.new[1], case.cache[0], case.cache[1], metadata)
    out = poisoned(case.q.shape, case.q.dtype)
    return backend.paged_attention_into(out, case.q, case.cache[0], case.cache[1], metadata, plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_every_head_width_is_right_for_mixed_lengths(width: int, dtype: torch.dtype) -> None:
    sequences = [(1, 5), (9, 9), (4, 23), (1, 1), (3, 300)]
    case = PagedCase(sequences, EVEN, width=width, block_size=16, dtype=dtype)
    assert relative_error(run(case), case.expected()) < LIMIT[dtype]


@pytest.mark.parametrize("q_to_kv", [UNEVEN, SINGLE, PLAIN], ids=str)
@pytest.mark.parametrize("block_size", [3, 64, 256])
def test_uneven_groups_and_any_block_size_are_right(q_to_kv: tuple[int, ...], block_size: int) -> None:
    case = PagedCase([(2, 19), (1, 133), (5, 77)], q_to_kv, width=64, block_size=block_size, dtype=DTYPES[-1])
    assert relative_error(run(case), case.expected()) < LIMIT[DTYPES[-1]]


@pytest.mark.parametrize("count", [1, 8] if INTERPRETING else [1, 2, 3, 8, 16, 33, 64])
def test_a_window_over_a_long_context_is_right_however_it_is_split(count: int) -> None:
    case = PagedCase([(count, LONG + 13)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    assert relative_error(run(case), case.expected()) < LIMIT[DTYPES[-1]]


@pytest.mark.parametrize("splits", [1, 2, 5] if INTERPRETING else [1, 2, 5, 16, 26])
def test_sequences_of_all_lengths_share_a_launch_with_any_number_of_splits(splits: int) -> None:
    sequences = [(1, LONG), (2, 2), (3, 256), (1, 257), (4, 600)][: 2 if INTERPRETING else 5]
    case = PagedCase(sequences, PLAIN, width=128, block_size=16, dtype=DTYPES[-1])
    plan = Plan(rows=16, block=64, tiles=1, splits=splits, warps=4, stages=3)
    assert relative_error(run(case, plan), case.expected()) < LIMIT[DTYPES[-1]]


def test_a_prefill_chunk_behind_a_cached_prefix_is_causal() -> None:
    chunk = 70 if INTERPRETING else 700
    case = PagedCase([(chunk, chunk + 45), (1, 9), (chunk, chunk)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    assert relative_error(run(case), case.expected()) < LIMIT[DTYPES[-1]]


def test_a_tree_window_sees_the_prefix_and_its_ancestors_only() -> None:
    parents = [[-1, 0, 0, 1, 1, 2], [-1, 0, 0]]
    case = PagedCase([(6, 90), (3, 3)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    masks, seen = [], []
    for (count, context), tree in zip(case.sequences, parents, strict=True):
        visible = torch.ones(count, context, dtype=torch.bool)
        visible[:, context - count :] = False
        for node in range(count):
            mask, at = 0, node
            while at >= 0:
                mask, at = mask | 1 << at, tree[at]
                visible[node, context - count :] = torch.tensor([bool(mask >> j & 1) for j in range(count)])
            masks.append(mask)
        seen.append(visible)
    starts = torch.tensor([c - n for n, c in case.sequences], dtype=torch.int32, device=DEVICE)
    out = run(case, masks_T=torch.tensor(masks, device=DEVICE), window_starts_S=starts)
    assert relative_error(out, case.expected(seen)) < LIMIT[DTYPES[-1]]
    assert relative_error(run(case), case.expected(seen)) > 0.05  # causal isn't the same


def test_sixty_four_rows_in_flight_use_every_bit_of_their_masks() -> None:
    case = PagedCase([(64, 64 + 37)], PLAIN, width=64, block_size=16, dtype=DTYPES[-1])
    visible = torch.rand(64, 64) < 0.5
    visible |= torch.eye(64, dtype=torch.bool)
    values = [sum(1 << j for j in range(64) if visible[i, j]) for i in range(64)]
    masks = torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], device=DEVICE)
    out = run(case, masks_T=masks, window_starts_S=torch.tensor([37], dtype=torch.int32, device=DEVICE))
    seen = torch.cat((torch.ones(64, 37, dtype=torch.bool), visible), dim=1)
    assert relative_error(out, case.expected([seen])) < LIMIT[DTYPES[-1]]


def test_empty_sequences_of_a_padded_batch_are_skipped_and_leave_the_output_alone() -> None:
    case = PagedCase([(2, 40), (1, 300)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    backend = TritonAttention()
    metadata = prepared(case, backend)
    pad = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    padded = dataclasses.replace(
        metadata,
        query_start_S1=torch.cat((metadata.query_start_S1, metadata.query_start_S1[-1:].expand(2))),
        context_lens_S=torch.cat((metadata.context_lens_S, pad)),
        block_tables_SB=torch.cat((case.tables, case.tables)).int(),
        max_query_len=8,
        max_context_len=4096,
    )
    backend.store_kv(case.new[0], case.new[1], case.cache[0], case.cache[1], padded)
    q = torch.cat((case.q, fresh(5, *case.q.shape[1:], dtype=case.q.dtype)))
    out = backend.paged_attention_into(poisoned(q.shape, q.dtype), q, case.cache[0], case.cache[1], padded)
    assert relative_error(out[:3], case.expected()) < LIMIT[DTYPES[-1]]
    assert out[3:].isnan().all()


def test_what_it_cannot_do_is_refused_by_name() -> None:
    case = PagedCase([(1, 5)], EVEN, width=32, block_size=16, dtype=torch.float16)
    with pytest.raises(ConfigError, match="head widths"):
        run(case)
    case.q = case.q.float()
    with pytest.raises(ConfigError, match="bfloat16 and float16"):
        run(case)


@pytest.mark.skipif(INTERPRETING, reason="graphs need a GPU")
def test_a_captured_graph_follows_lengths_and_tables_that_change_on_the_device() -> None:
    backend = TritonAttention()
    first = PagedCase([(3, 4000), (1, 9)], EVEN, width=128, block_size=16, dtype=torch.bfloat16)
    metadata = prepared(first, backend)
    metadata = dataclasses.replace(metadata, max_query_len=4, max_context_len=4096)
    q, cache, out = first.q.clone(), first.cache.clone(), poisoned(first.q.shape, first.q.dtype)

    def forward() -> None:
        backend.paged_attention_into(out, q, cache[0], cache[1], metadata)

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for sequences in ([(3, 4000), (1, 9)], [(1, 100), (3, 3901)], [(2, 2000), (2, 2001)]):
        case = PagedCase(sequences, EVEN, width=128, block_size=16, dtype=torch.bfloat16)
        backend.store_kv(case.new[0], case.new[1], case.cache[0], case.cache[1], prepared(case, backend))
        cache.fill_(float("nan"))[:, : case.cache.shape[1]].copy_(case.cache[:, : cache.shape[1]])
        metadata.block_tables_SB.zero_()[:, : case.tables.shape[1]].copy_(case.tables)
        metadata.query_start_S1.copy_(torch.tensor(case.query_start, dtype=torch.int32))
        metadata.context_lens_S.copy_(torch.tensor(case.context_lens, dtype=torch.int32))
        q.copy_(case.q)
        out.fill_(float("nan"))
        for _ in range(3):
            graph.replay()
        assert relative_error(out, case.expected()) < LIMIT[torch.bfloat16]
