"""A pass in device tensors is the pass of lists, padding does nothing, and deterministic rows don't see their batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.comm import Group, SingleGroup
from pearl_ray.kernels.attention_torch import TorchAttention
from pearl_ray.kernels.backend import choose_attention
from pearl_ray.kernels.ops import TorchLayerOps, choose_layer_ops
from pearl_ray.model.batching import Entry, make_batch
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.transformer import Transformer
from tests.thread_group import on_ranks
from tests.tiny import InMemorySource, in_memory_source

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 4, 96
FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen2": {},  # biases
    "qwen3": {},  # norms of the heads
}


class Model:
    """One rank with a cache full of NaN."""

    def __init__(
        self, source: InMemorySource, group: Group | None = None, dtype: torch.dtype = torch.float64, **options: bool
    ) -> None:
        group = group or SingleGroup()
        config, plan = source.config, ShardPlan.make(source.config, group.size)
        attention = TorchAttention(**options)
        self.transformer = Transformer(
            config, plan, group.rank, source, dtype=dtype, device=CPU, group=group, attention=attention, **options
        )
        kv_heads = len(plan.shards[group.rank].kv_heads)
        self.cache = KVCache(NUM_BLOCKS, BLOCK, config.num_layers, kv_heads, config.head_dim, dtype, CPU)
        for part in (*self.cache.k, *self.cache.v):
            part.fill_(math.nan)

    def run(self, batch: ForwardBatch | StaticBatch, lanes: torch.Tensor | None = None) -> torch.Tensor:
        return self.transformer.local_logits(self.transformer.forward(batch, self.cache, lanes))

    def feed(self, entries: Sequence[Entry]) -> torch.Tensor:
        return self.run(make_batch(entries, BLOCK, CPU))

    def stored(self) -> torch.Tensor:
        """Everything in the cache, as bits."""
        return torch.stack((*self.cache.k, *self.cache.v)).view(torch.uint8)


def static_of(
    batch: ForwardBatch,
    *,
    num_rows: int = 0,
    num_seqs: int = 0,
    all_rows: bool = False,
    kind: torch.dtype = torch.int32,
) -> StaticBatch:
    """The same pass; with ``num_seqs`` empty sequences, the first in front, and ``num_rows`` rows of rubbish."""
    starts, lens = list(batch.query_start), list(batch.context_lens)
    tables = torch.nn.functional.pad(batch.block_tables_SB, (0, 5), value=-77)
    for row, length in enumerate(lens):
        tables[row, -(-length // BLOCK) :] = 10**6  # behind the keys
    if num_seqs:
        starts = [0, *starts, *[starts[-1]] * (num_seqs - 1)]
        lens = [12345, *lens, *[-3] * (num_seqs - 1)]
        rubbish = torch.full((num_seqs, tables.shape[1]), 10**6)
        tables = torch.cat((rubbish[:1], tables, rubbish[1:]))

    def pad(values: torch.Tensor, rubbish: int) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, num_rows), value=rubbish).to(kind)

    return StaticBatch(
        pad(batch.token_ids_T, 10**6),
        pad(batch.positions_T, -9),
        pad(batch.slots_T, 3),  # a slot that somebody owns
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        tables.int(),
        None if all_rows else batch.output_rows_R,
        max_query_len=64,
        max_context_len=100,
    )


def tokens_of(length: int, seed: int, vocab_size: int = 64) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


A, B, C = tokens_of(21, 1), tokens_of(9, 2), tokens_of(6, 3)
TABLES = ([9, 3, 4, 5, 30, 1], [2, 17, 8], [0, 40])
PREFILL = [Entry(A[:16], 0, TABLES[0], 0), Entry(B[:7], 0, TABLES[1], 1)]
MIXED = [Entry(A[16:], 16, TABLES[0], 3), Entry(B[7:], 7, TABLES[1], 2), Entry(C, 0, TABLES[2], 1)]


def both_ways(
    source: InMemorySource, tp_size: int, make_static: Callable[[ForwardBatch], StaticBatch], **options: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Per rank: logits of both passes of lists, of both static ones, and what either left in the cache."""

    def work(group: Group) -> tuple[torch.Tensor, ...]:
        plain, static = Model(source, group, **options), Model(source, group, **options)
        batches = [make_batch(entries, BLOCK, CPU) for entries in (PREFILL, MIXED)]
        expected = torch.cat([plain.run(batch) for batch in batches])
        got = torch.cat([static.run(make_static(batch)) for batch in batches])
        return expected, got, plain.stored(), static.stored()

    if tp_size == 1:
        return tuple([part] for part in work(SingleGroup()))  # type: ignore[return-value]
    return tuple(list(parts) for parts in zip(*on_ranks(tp_size, work), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_rows_and_sequences_change_nothing(family: str, tp_size: int) -> None:
    source = in_memory_source(family.split(",")[0], **FAMILIES[family])
    expected, got, left, left_static = both_ways(
        source, tp_size, lambda batch: static_of(batch, num_rows=5, num_seqs=3), deterministic=True
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(left, left_static, strict=True))
    assert float(torch.cat(got, -1).std()) > 0.5, "the logits say something"


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_without_padding_the_bits_are_those_of_the_pass_of_lists(kind: torch.dtype) -> None:
    source = in_memory_source()
    expected, got, left, left_static = both_ways(source, 2, lambda batch: static_of(batch, kind=kind))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(left, left_static, strict=True))
    padded = both_ways(source, 1, lambda batch: static_of(batch, num_rows=2, num_seqs=2))
    torch.testing.assert_close(padded[0], padded[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tables_may_be_all_lanes_and_sequences_say_which(tp_size: int) -> None:
    source, lanes = in_memory_source(), torch.tensor([4, 5, 0, 3, 4], dtype=torch.int32)  # the first and last: padding

    def work(group: Group) -> tuple[torch.Tensor, ...]:
        direct, by_lane = Model(source, group), Model(source, group)
        for entries, count in ((PREFILL, 4), (MIXED, 5)):
            static = static_of(make_batch(entries, BLOCK, CPU), num_rows=3, num_seqs=2)
            tables = torch.full((7, static.block_tables_SB.shape[1]), 10**6, dtype=torch.int32)
            tables[lanes[:count].long()] = static.block_tables_SB
            expected = direct.run(static)
            got = by_lane.run(replace(static, block_tables_SB=tables), lanes[:count])
            assert torch.equal(got, expected)
        return direct.stored(), by_lane.stored()

    for left, left_by_lane in [work(SingleGroup())] if tp_size == 1 else on_ranks(tp_size, work):
        assert torch.equal(left, left_by_lane)


def test_without_output_rows_every_row_comes_out() -> None:
    source = in_memory_source("qwen3")
    entries = [entry._replace(num_outputs=len(entry.tokens)) for entry in PREFILL]
    batch = make_batch(entries, BLOCK, CPU)
    expected = Model(source, deterministic=True).run(batch)
    static = static_of(batch, num_rows=2, num_seqs=1, all_rows=True)
    out = Model(source, deterministic=True).run(static)
    assert torch.equal(out[:-2], expected) and out.shape[0] == len(expected) + 2


def test_a_batch_of_nothing_but_padding_leaves_the_cache_alone() -> None:
    model, batch = Model(in_memory_source()), make_batch(PREFILL, BLOCK, CPU)
    static = static_of(batch, num_rows=2)
    empty = StaticBatch(
        static.token_ids_T, static.positions_T, static.slots_T, torch.zeros(3, dtype=torch.int32),
        static.context_lens_S, static.block_tables_SB, None, 64, 100,
    )  # fmt: skip
    before = model.stored()
    assert model.run(empty).shape == (25, 64)
    assert torch.equal(model.stored(), before)


def test_a_sequence_longer_than_the_batch_says_is_noticed() -> None:
    model = Model(in_memory_source())
    static = static_of(make_batch(PREFILL, BLOCK, CPU))
    with pytest.raises(AssertionError):
        model.run(
            StaticBatch(
                static.token_ids_T, static.positions_T, static.slots_T, static.query_start_S1, static.context_lens_S,
                static.block_tables_SB, None, 15, 100,
            )
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("overrides", [{}, {"hidden_size": 67, "intermediate_size": 131}], ids=["even", "odd"])
def test_deterministic_rows_have_the_same_bits_in_every_batch_and_chunk(
    dtype: torch.dtype, overrides: dict[str, object]
) -> None:
    source = in_memory_source("qwen3", **overrides)
    texts = [tokens_of(17, seed) for seed in range(8)]
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist()
    tables = [order[6 * index : 6 * index + 6] for index in range(8)]

    def rows(chosen: Sequence[int], sizes: Sequence[int], layout: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits ``[sequence, position, V]``, the texts fed together in chunks of those sizes."""
        model, parts, at = Model(source, dtype=dtype, deterministic=True), [], 0
        for size in sizes:
            entries = [Entry(texts[i][at : at + size], at, layout[i], size) for i in chosen]
            parts.append(model.feed(entries).view(len(chosen), size, -1))
            at += size
        return torch.cat(parts, dim=1)

    expected = torch.cat([rows([index], [1] * 17, tables) for index in range(8)])
    in_a_row = [list(range(6 * index, 6 * index + 6)) for index in range(8)]
    for chosen, sizes, layout in (
        ([3], [8, 1, 8], in_a_row),
        ([3], [17], tables),
        ([6, 0, 3], [1] * 17, in_a_row),
        ([6, 0, 3], [8, 8, 1], tables),
        (list(range(8)), [1] * 17, tables),
        (list(range(8)), [8, 1, 8], in_a_row),
        (list(range(8)), [17], tables),
    ):
        assert torch.equal(rows(chosen, sizes, layout), expected[chosen]), (chosen, sizes)


def test_deterministic_linear_maps_round_as_the_others_do() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        plain, fixed = TorchLayerOps(), TorchLayerOps(deterministic=True)
        weight, bias = torch.randn(31, 67, dtype=dtype), torch.randn(31, dtype=dtype)
        for count in (0, 1, 8, 13):
            x = torch.randn(count, 67, dtype=dtype)
            out = fixed.linear(x, fixed.lay_out(weight), bias)
            assert out.shape == (count, 31)
            torch.testing.assert_close(out, plain.linear(x, plain.lay_out(weight), bias), rtol=0, atol=tolerance)


def test_settling_on_a_cpu_does_nothing_and_the_choice_is_torch() -> None:
    model = Model(in_memory_source())
    model.transformer.settle(16)
    assert choose_layer_ops("cpu", torch.bfloat16).name == "torch"
    assert choose_attention("auto", "cpu", deterministic=True).name == "torch"
    assert choose_layer_ops("cpu", torch.float32, deterministic=True).deterministic
