"""Paged attention by Triton against float32: every head width, odd sizes, splits, masks, and nothing foreign read."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels import attention_plan, attention_triton
from pearl_ray.kernels.attention_triton import Plan, TritonAttention, TritonMetadata
from tests.kernel_checks import (
    CAN_RUN,
    DEVICE,
    INTERPRETING,
    REASON,
    PagedCase,
    fresh,
    poisoned,
    relative_error,
    sum_products_by_row,
)

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


@pytest.mark.parametrize("parts", [1, 4, 10] if INTERPRETING else [1, 3, 10, 25, 80, 130])
def test_sequences_of_all_lengths_share_a_launch_with_any_number_of_parts(parts: int) -> None:
    sequences = [(1, LONG), (2, 2), (3, 256), (1, 257), (4, 600)][: 2 if INTERPRETING else 5]
    case = PagedCase(sequences, PLAIN, width=128, block_size=16, dtype=DTYPES[-1])
    plan = Plan(rows=16, block=64, tiles=1, parts=parts, warps=4, stages=3)
    assert relative_error(run(case, plan), case.expected()) < LIMIT[DTYPES[-1]]


@pytest.mark.parametrize("alone_keys", [0, 64, 384, 9000])
@pytest.mark.parametrize("has_one_loop", [False, True])
def test_one_loop_or_two_and_short_contexts_in_one_part_or_several_are_right(
    has_one_loop: bool, alone_keys: int
) -> None:
    sequences = [(1, LONG), (2, 2), (3, 64), (1, 65), (4, 200)]
    case = PagedCase(sequences, EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    for rows, block in ((16, 32), (32, 64)):
        plan = Plan(rows, block, 1, 15, 4, 3, min_keys=64, alone_keys=alone_keys, has_one_loop=has_one_loop)
        assert relative_error(run(case, plan), case.expected()) < LIMIT[DTYPES[-1]]


def test_entries_of_a_table_behind_the_keys_may_hold_anything() -> None:
    case = PagedCase([(1, 300), (3, 77)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    wild = torch.randint(-(2**31), 2**31 - 1, (2, 64), dtype=torch.int32, device=DEVICE)
    wild[:, : case.tables.shape[1]] = case.tables
    plan = Plan(16, 64, 1, 6, 4, 4, min_keys=64, has_one_loop=True)
    out = run(case, plan, block_tables_SB=wild, max_context_len=1024)
    assert relative_error(out, case.expected()) < LIMIT[DTYPES[-1]]


def test_a_prefill_chunk_behind_a_cached_prefix_is_causal() -> None:
    chunk = 70 if INTERPRETING else 700
    case = PagedCase([(chunk, chunk + 45), (1, 9), (chunk, chunk)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    assert relative_error(run(case), case.expected()) < LIMIT[DTYPES[-1]]


@pytest.mark.parametrize("parts", [None, 1, 60])
def test_a_chunk_beside_many_short_sequences_is_cut_into_parts_and_they_are_not(parts: int | None) -> None:
    """Sequences without tokens among them, and more of them than are looked through at a time."""
    ones = [(1, 3 + i % 40) for i in range(68)]
    case = PagedCase([*ones, (100, LONG), (17, 60), (1, 5)], EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    backend = TritonAttention()
    metadata = prepared(case, backend)
    starts, lens = metadata.query_start_S1, metadata.context_lens_S
    gaps = [0, *range(60, len(starts))]  # an empty sequence at the beginning and before each of the last ones
    order = sorted([*range(len(starts)), *gaps])
    owners = torch.tensor([i for i in order if i < len(lens)], device=DEVICE)
    again = torch.tensor([i == j for i, j in pairwise(order)], device=DEVICE)[: len(owners)]
    metadata = dataclasses.replace(
        metadata,
        query_start_S1=starts[torch.tensor(order, device=DEVICE)][: len(owners) + 1].contiguous(),
        context_lens_S=torch.where(again, 777, lens[owners]).int(),  # where there are no tokens it may be anything
        block_tables_SB=case.tables.index_select(0, owners),
        cuts={},
    )
    num_tokens = [int(n) for n in metadata.query_start_S1.diff()]
    assert num_tokens.count(0) >= 10
    plan = attention_plan.make_plan(metadata, case.cache[0].shape[2], 64, 16)
    if parts is not None:
        plan = Plan(16, 64, tiles=20, parts=parts, warps=4, stages=3, min_keys=64)
    assert plan.tiles > 1
    backend.store_kv(case.new[0], case.new[1], case.cache[0], case.cache[1], metadata)
    out = poisoned(case.q.shape, case.q.dtype)
    backend.paged_attention_into(out, case.q, case.cache[0], case.cache[1], metadata, plan)
    assert relative_error(out, case.expected()) < LIMIT[DTYPES[-1]]
    per_part, *units = metadata.cuts[plan].tolist()
    assert len(units) == plan.most_units(metadata)
    found = [unit for unit in units if unit[0] >= 0]
    assert found == units[: len(found)] and len({tuple(unit[:3]) for unit in found}) == len(found)
    facts = [metadata.query_start_S1[:-1], metadata.query_start_S1.diff(), metadata.context_lens_S]
    assert all(unit[4:7] == [int(fact[unit[0]]) for fact in facts] for unit in found)
    tokens, blocks = plan.rows // metadata.group_size, -(-metadata.context_lens_S // plan.block)
    slots = 0
    for seq, count in enumerate(num_tokens):
        own = [unit[1:4] for unit in found if unit[0] == seq]
        keys = int(blocks[seq])
        num_parts = 1 if keys <= -(-plan.alone_keys // plan.block) else -(-keys // per_part[0])
        tiles = -(-count // tokens)
        assert [unit[:2] for unit in own] == [[tile, part] for tile in range(tiles) for part in range(num_parts)]
        if num_parts > 1:
            assert [unit[2] for unit in own] == [slots + tile * num_parts for tile, _, _ in own]
            slots += tiles * num_parts
    assert slots <= plan.most_slots(metadata) and (parts is None or (slots > 0) == (parts == 60))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_launch_has_room_for_every_unit_and_slot(data: st.DataObject) -> None:
    """The bounds of the grid and of the scratch memory, against what the kernel ``cut`` would make."""
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 9000)), min_size=1, max_size=40))
    group, block = data.draw(st.sampled_from([1, 3, 8])), data.draw(st.sampled_from([32, 64, 128]))
    rows = max(16, data.draw(st.sampled_from([16, 32, 128])))
    counts = [count for count, _ in lengths]
    tokens, longest = rows // group, max(max(counts), 1)
    spare, min_keys = data.draw(st.integers(0, 50)), block * data.draw(st.integers(1, 4))
    metadata = SimpleNamespace(
        context_lens_S=[0] * len(lengths),
        slots_T=[0] * (sum(counts) + spare),
        group_size=group,
        max_context_len=max(context + count for count, context in lengths) + spare,
    )
    alone_keys = data.draw(st.sampled_from([0, 512]))
    parts = data.draw(st.integers(1, 300))
    plan = Plan(rows, block, -(-longest // tokens), parts, 4, 3, min_keys=min_keys, alone_keys=alone_keys)
    tiles = [-(-count // tokens) for count in counts]
    blocks = [-(-(context + count) // block) for count, context in lengths]
    per_part = max(-(-sum(t * b for t, b in zip(tiles, blocks, strict=True)) // parts), min_keys // block)
    cut = [1 if b <= -(-alone_keys // block) else -(-b // per_part) for b in blocks]
    assert sum(t * c for t, c in zip(tiles, cut, strict=True)) <= plan.most_units(metadata)  # type: ignore[arg-type]
    several = sum(t * c for t, c in zip(tiles, cut, strict=True) if c > 1)
    assert several <= plan.most_slots(metadata)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("has_one_loop", [False, True])
def test_masks_hold_in_one_loop_and_in_two(has_one_loop: bool) -> None:
    case = PagedCase([(8, 8 + 150)], PLAIN, width=64, block_size=16, dtype=DTYPES[-1])
    visible = torch.rand(8, 8) < 0.5
    visible |= torch.eye(8, dtype=torch.bool)
    masks = torch.tensor([sum(1 << j for j in range(8) if row[j]) for row in visible.tolist()], device=DEVICE)
    seen = torch.cat((torch.ones(8, 150, dtype=torch.bool), visible), dim=1)
    plan = Plan(16, 32, 1, 6, 4, 3, min_keys=64, has_one_loop=has_one_loop)
    out = run(case, plan, masks_T=masks, window_starts_S=torch.tensor([150], dtype=torch.int32, device=DEVICE))
    assert relative_error(out, case.expected([seen])) < LIMIT[DTYPES[-1]]


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


def rows_of(
    cases: list[tuple[torch.Tensor, torch.Tensor, int]], q_to_kv: tuple[int, ...], *, is_static: bool
) -> list[torch.Tensor]:
    """Deterministic attention of sequences ``(q of the last tokens, kv, context)``, one batch; blocks of 16."""
    backend, dtype, block_size = TritonAttention(deterministic=True), cases[0][0].dtype, 16
    num_kv, width = cases[0][1].shape[2:]
    counts = [-(-context // block_size) for _, _, context in cases]
    order = torch.randperm(sum(counts) + 2)
    cache = poisoned((2, len(order), block_size, num_kv, width), dtype)
    tables = torch.zeros(len(cases), max(counts), dtype=torch.int32, device=DEVICE)
    starts, lens = [0], []
    for index, (q, kv, context) in enumerate(cases):
        blocks, order = order[: counts[index]].to(DEVICE), order[counts[index] :]
        tables[index, : counts[index]] = blocks
        at = torch.arange(context, device=DEVICE)
        cache.flatten(1, 2)[:, blocks[at // block_size] * block_size + at % block_size] = kv[:, :context]
        starts.append(starts[-1] + len(q))
        lens.append(context)
    rows = torch.zeros(starts[-1], dtype=torch.int64, device=DEVICE)
    facts = {"block_size": block_size, "q_to_kv": q_to_kv, "dtype": dtype}
    if is_static:
        on_device = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (starts, lens)]
        bound = (2 if INTERPRETING else 40) * max(lens)
        batch = StaticBatch(rows, rows, rows - 1, *on_device, tables, None, 16, bound)
        metadata = backend.prepare_static(batch, **facts)
    else:
        metadata = backend.prepare(
            ForwardBatch(rows, rows, rows - 1, tuple(starts), tuple(lens), tables.long(), rows), **facts
        )
    q = torch.cat([case[0] for case in cases])
    out = backend.paged_attention_into(poisoned(q.shape, dtype), q, cache[0], cache[1], metadata)
    return [out[a:b] for a, b in pairwise(starts)]


@pytest.mark.parametrize("q_to_kv", [(0, 0, 0)] if INTERPRETING else [EVEN, UNEVEN, SINGLE, PLAIN], ids=str)
@pytest.mark.parametrize("width", [64] if INTERPRETING else [64, 80, 128, 256])
@pytest.mark.parametrize("context", [133] if INTERPRETING else [131, 517, 5000])
def test_a_fixed_plan_gives_a_row_the_same_bits_in_every_batch(
    context: int, width: int, q_to_kv: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETING:
        sum_products_by_row(monkeypatch)
        monkeypatch.setattr(attention_plan, "FIXED_SPLIT_KEYS", 128)  # the window lies across its end
    dtype, num_kv, count = DTYPES[-1], q_to_kv[-1] + 1, 8
    kv, q = fresh(2, context, num_kv, width, dtype=dtype), fresh(count, len(q_to_kv), width, dtype=dtype)
    k, v = kv.float()[:, :, list(q_to_kv)]
    scores = torch.einsum("thd,lhd->htl", q.float(), k) / width**0.5
    visible = torch.arange(context, device=DEVICE) <= torch.arange(context - count, context, device=DEVICE)[:, None]
    expected = torch.einsum("htl,lhd->thd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    window = rows_of([(q, kv, context)], q_to_kv, is_static=False)[0]
    assert relative_error(window, expected) < LIMIT[dtype]
    others = [
        (fresh(n, len(q_to_kv), width, dtype=dtype), fresh(2, length, num_kv, width, dtype=dtype), length)
        for n, length in ((1, 3), (8, 40), (1, 77), (3, 3), (2, 40 if INTERPRETING else 600), (1, 1), (5, 20))
    ]
    for batch, is_static in (((), True), (others[:2], False), (others[:2], True), (others, True), (others, False)):
        together = rows_of([*batch[:1], (q, kv, context), *batch[1:]], q_to_kv, is_static=is_static)
        assert torch.equal(together[min(len(batch), 1)], window), (len(batch), is_static)
    for row in (1, 4, 7) if INTERPRETING else range(count):
        alone = (q[row : row + 1], kv, context - count + 1 + row)
        assert torch.equal(rows_of([alone], q_to_kv, is_static=False)[0][0], window[row]), row
    among = rows_of([others[1], (q[5:6], kv, context - 2), others[0]], q_to_kv, is_static=True)
    assert torch.equal(among[1][0], window[5])


def test_a_long_chunk_under_a_fixed_plan_is_causal_and_has_the_bits_of_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if INTERPRETING:
        sum_products_by_row(monkeypatch)
    chunk, context = (40, 75) if INTERPRETING else (700, 1900)
    dtype = DTYPES[-1]
    kv, q = fresh(2, context, 2, 64, dtype=dtype), fresh(chunk, 6, 64, dtype=dtype)
    whole = rows_of([(q, kv, context)], EVEN, is_static=False)[0]
    at = 0
    for size in (1, 13, 2, chunk - 16):
        part = rows_of([(q[at : at + size], kv, context - chunk + at + size)], EVEN, is_static=False)[0]
        assert torch.equal(part, whole[at : at + size])
        at += size


def test_a_fixed_plan_with_little_scratch_memory_goes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [(1, 5), (9, 9), (4, 23), (1, 600), (3, 30)]
    case = PagedCase(sequences, EVEN, width=64, block_size=16, dtype=DTYPES[-1])
    backend = TritonAttention(deterministic=True)
    monkeypatch.setattr(attention_triton, "num_multiprocessors", lambda device: 1)
    monkeypatch.setattr(attention_triton, "MAX_TILE", 2048)
    metadata = prepared(case, backend)
    backend.store_kv(case.new[0], case.new[1], case.cache[0], case.cache[1], metadata)
    launches = []
    monkeypatch.setattr(
        backend,
        "_launch",
        lambda *given: (launches.append(len(given[4].context_lens_S)), TritonAttention._launch(backend, *given)),
    )
    out = backend.paged_attention_into(poisoned(case.q.shape, case.q.dtype), case.q, *case.cache, metadata)
    assert len(launches) > 1 and sum(launches) == len(sequences)
    assert relative_error(out, case.expected()) < LIMIT[DTYPES[-1]]


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
        backend.paged_attention_into(out, q, cache[0], cache[1], dataclasses.replace(metadata, cuts={}))

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
