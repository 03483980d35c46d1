"""Paged attention in torch against a reference that loops over tokens and heads in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from pearl_ray.core.batch import ForwardBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels import attention_torch
from pearl_ray.kernels.attention_torch import TorchAttention
from pearl_ray.kernels.backend import choose_attention

GROUPED = (0, 0, 0, 1, 1, 1, 2, 2, 2)
UNEVEN = (0, 1, 1, 1, 2, 2)
SINGLE = (0,)


class Case:
    """Sequences of given ``(num_query, context_len)`` in a cache whose other slots are all NaN."""

    def __init__(
        self,
        sequences: Sequence[tuple[int, int]],
        q_to_kv: Sequence[int],
        *,
        width: int = 8,
        block_size: int = 4,
        dtype: torch.dtype = torch.float64,
        in_a_row: bool = False,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.q_to_kv, self.block_size, self.sequences = tuple(q_to_kv), block_size, sequences
        num_kv = q_to_kv[-1] + 1
        counts = [-(-context // block_size) for _, context in sequences]
        total = sum(counts) + 3
        order = list(range(total)) if in_a_row else torch.randperm(total).tolist()
        blocks = [[order.pop(0) for _ in range(count)] for count in counts]
        num_tokens = sum(n for n, _ in sequences)
        self.q = torch.randn(num_tokens, len(q_to_kv), width, dtype=dtype)
        self.cache = torch.full((2, total, block_size, num_kv, width), math.nan, dtype=dtype)
        self.keys = [torch.randn(2, context, num_kv, width, dtype=dtype) for _, context in sequences]
        slots, positions, start = [], [], [0]
        new: list[torch.Tensor] = []
        for (count, context), table, keys in zip(sequences, blocks, self.keys, strict=True):
            where = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(context)])
            old = context - count
            self.cache.flatten(1, 2)[:, where[:old]] = keys[:, :old]
            slots.append(where[old:])
            positions.append(torch.arange(old, context))
            new.append(keys[:, old:])
            start.append(start[-1] + count)
        self.new = torch.cat(new, dim=1)
        tables = torch.zeros(len(sequences), max(counts), dtype=torch.int64)
        for index, table in enumerate(blocks):
            tables[index, : len(table)] = torch.tensor(table)
        self.batch = ForwardBatch(
            token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
            positions_T=torch.cat(positions),
            slots_T=torch.cat(slots),
            query_start=tuple(start),
            context_lens=tuple(context for _, context in sequences),
            block_tables_SB=tables,
            output_rows_R=torch.arange(num_tokens),
        )

    def run(self) -> torch.Tensor:
        backend = TorchAttention()
        metadata = backend.prepare(self.batch, block_size=self.block_size, q_to_kv=self.q_to_kv, dtype=self.q.dtype)
        backend.store_kv(self.new[0], self.new[1], self.cache[0], self.cache[1], metadata)
        return backend.paged_attention(self.q, self.cache[0], self.cache[1], metadata)

    def expected(self) -> torch.Tensor:
        out, row = torch.empty(self.q.shape, dtype=torch.float64), 0
        for (count, context), kv in zip(self.sequences, self.keys, strict=True):
            for i in range(count):
                seen = context - count + i + 1
                for head, kv_head in enumerate(self.q_to_kv):
                    k, v = kv[:, :seen, kv_head].double()
                    scores = k @ self.q[row, head].double() / math.sqrt(self.q.shape[-1])
                    out[row, head] = torch.softmax(scores, 0) @ v
                row += 1
        return out


@pytest.mark.parametrize("q_to_kv", [GROUPED, UNEVEN, SINGLE, (0, 1, 2), (0, 0, 1)])
@pytest.mark.parametrize(
    "sequences", [[(1, 1)], [(1, 9)], [(5, 5)], [(3, 17)], [(1, 5), (9, 9), (4, 23), (1, 1), (2, 8)]]
)
def test_mixed_batches_over_scattered_blocks_equal_the_naive_loop_and_read_no_foreign_slot(
    sequences: list[tuple[int, int]], q_to_kv: tuple[int, ...]
) -> None:
    case = Case(sequences, q_to_kv, seed=len(sequences))
    torch.testing.assert_close(case.run(), case.expected(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("width", [2, 8, 10, 64])
def test_odd_block_sizes_and_widths_are_right(block_size: int, width: int) -> None:
    case = Case([(2, 19), (1, 33), (4, 4)], UNEVEN, width=width, block_size=block_size, seed=width)
    torch.testing.assert_close(case.run(), case.expected(), rtol=0, atol=1e-13)


def test_blocks_that_lie_in_a_row_are_read_in_place_with_the_same_result() -> None:
    case = Case([(3, 17), (1, 6), (2, 2)], GROUPED, in_a_row=True)
    spans = attention_torch._spans(case.batch, case.block_size)
    assert all(isinstance(span.slots, slice) for span in spans)
    torch.testing.assert_close(case.run(), case.expected(), rtol=0, atol=1e-13)


def test_a_chunk_longer_than_the_limit_is_cut_and_still_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_torch, "MAX_CHUNK", 4)
    case = Case([(11, 11), (1, 7), (9, 30), (5, 5)], UNEVEN)
    torch.testing.assert_close(case.run(), case.expected(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precisions_err_by_their_own_rounding(dtype: torch.dtype, tolerance: float) -> None:
    case = Case([(1, 70), (9, 40)], GROUPED, width=64, block_size=16, dtype=dtype)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=0, atol=tolerance)


def test_slot_minus_one_writes_nothing_and_the_others_land_where_they_should() -> None:
    case = Case([(3, 10), (1, 5)], GROUPED)
    slots = case.batch.slots_T.clone()
    skipped = int(slots[2])
    slots[2] = -1
    object.__setattr__(case.batch, "slots_T", slots)
    written = case.cache.flatten(1, 2).isnan().logical_not().all(dim=(0, 2, 3)).sum()
    out = case.run()
    flat = case.cache.flatten(1, 2)
    assert flat[:, skipped].isnan().all()
    assert flat.isnan().logical_not().all(dim=(0, 2, 3)).sum() == written + 3
    for row in (0, 1, 3):
        assert flat[:, int(slots[row])].equal(case.new[:, row])
    torch.testing.assert_close(out[3], case.expected()[3], rtol=0, atol=1e-13)


def test_a_long_context_with_a_chunk_behind_it_is_right_at_its_ends() -> None:
    case = Case([(3, 30000)], GROUPED, width=8, block_size=16, dtype=torch.float32)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=0, atol=2e-6)


def test_the_backend_is_chosen_by_name_and_others_are_refused_with_what_is_possible() -> None:
    assert choose_attention("auto", "cpu").name == "torch"
    assert choose_attention("torch", "cpu").name == "torch"
    for name in ("triton", "flash-attn", "nonsense"):
        with pytest.raises(ConfigError, match=f"{name}.*'auto' or 'torch'"):
            choose_attention(name, "cpu")
