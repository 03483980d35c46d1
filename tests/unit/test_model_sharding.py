"""The sharding plan: every rank count, uneven heads, nothing lost and nothing held twice but KV heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pearl_ray.core.errors import ConfigError
from pearl_ray.model.config import from_hf_config
from pearl_ray.model.sharding import ShardPlan, split
from tests.tiny import hf_config

TINY = from_hf_config(hf_config())


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, ShardPlan]:
    num_kv, group = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    heads = num_kv * group
    config = replace(
        TINY,
        num_heads=heads,
        num_kv_heads=num_kv,
        intermediate_size=draw(st.integers(heads, 5000)),
        vocab_size=draw(st.integers(heads, 5000)),
    )
    return group, ShardPlan.make(config, draw(st.integers(1, heads)))


def joined(ranges: list[range]) -> list[int]:
    return [item for part in ranges for item in part]


@given(plans())
def test_ranges_partition_heads_columns_and_vocabulary_and_none_is_empty(made: tuple[int, ShardPlan]) -> None:
    _, plan = made
    for name in ("q_heads", "intermediate", "vocab"):
        ranges = [getattr(shard, name) for shard in plan.shards]
        assert all(ranges)
        assert joined(ranges) == list(range(ranges[-1].stop))
    assert plan.vocab_sizes == tuple(len(shard.vocab) for shard in plan.shards)


@given(plans())
def test_every_query_head_finds_its_kv_head_and_no_rank_holds_one_it_does_not_need(made: tuple[int, ShardPlan]) -> None:
    group, plan = made
    for shard in plan.shards:
        assert len(shard.q_to_kv) == len(shard.q_heads)
        assert [shard.kv_heads[local] for local in shard.q_to_kv] == [head // group for head in shard.q_heads]
        assert {shard.kv_heads[local] for local in shard.q_to_kv} == set(shard.kv_heads)


@given(st.integers(1, 3000), st.integers(1, 64), st.sampled_from([1, 8, 16]))
def test_a_split_is_even_to_one_unit(total: int, parts: int, alignment: int) -> None:
    if total < parts:
        return
    sizes = [len(part) for part in split(total, parts, alignment)]
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= alignment
    assert sizes == sorted(sizes, reverse=True)


def test_nine_heads_over_three_kv_heads_on_seven_ranks_replicate_the_straddled_kv_heads() -> None:
    plan = ShardPlan.make(TINY, 7)
    assert [len(shard.q_heads) for shard in plan.shards] == [2, 2, 1, 1, 1, 1, 1]
    assert [list(shard.kv_heads) for shard in plan.shards] == [[0], [0, 1], [1], [1], [2], [2], [2]]


def test_large_ranges_are_whole_multiples_of_sixteen() -> None:
    plan = ShardPlan.make(replace(TINY, vocab_size=49152, intermediate_size=1536), 7)
    assert all(size % 16 == 0 for size in plan.vocab_sizes)
    assert all(len(shard.intermediate) % 16 == 0 for shard in plan.shards)


@pytest.mark.parametrize("size", [0, -1, 10, True, 1.5])
def test_a_size_that_the_heads_do_not_allow_is_refused_with_the_range(size: int) -> None:
    with pytest.raises(ConfigError, match="1 to 9"):
        ShardPlan.make(TINY, size)
