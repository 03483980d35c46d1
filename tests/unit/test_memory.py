"""How many blocks fit, as properties; the largest pass; and a warm-up run on a real model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pearl_ray.core.errors import OutOfMemoryError
from pearl_ray.kernels.sampler import TorchSampler
from pearl_ray.model.loading import LoadedModel, Role, load_model
from pearl_ray.model.memory import Place, ShardUsage, num_cache_blocks, size, tensor_parallel_size_for
from pearl_ray.model.warm_up import PassSize, entries_of, heaviest_sampling, warm_up
from tests.thread_group import ThreadGroup, on_ranks

GIB = 1 << 30


def usage(temporary: int = 0, graphs: int = 0, per_block: int = 1 << 20) -> ShardUsage:
    return ShardUsage(temporary_bytes=temporary, graph_bytes=graphs, bytes_per_block=per_block)


def place(total: int, used: int = 0, utilization: float | None = 0.9, *shards: ShardUsage) -> Place:
    shards = shards or (usage(),)
    return Place(name="the GPU", total_bytes=total, used_bytes=used, utilization=utilization, shards=shards)


BYTES = st.integers(0, 200 * GIB)
USAGES = st.builds(usage, st.integers(0, 20 * GIB), st.integers(0, GIB), st.integers(1, 1 << 26))
PLACES = st.builds(
    lambda total, used, utilization, shards: place(total, used, utilization, *shards),
    st.integers(1, 200 * GIB),
    BYTES,
    st.none() | st.floats(0.01, 1.0),
    st.lists(USAGES, min_size=1, max_size=3),
)
SIZES = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 256),
        "max_model_len": st.integers(2, 200_000),
        "max_num_seqs": st.integers(1, 512),
    }
)


def in_all(places: list[Place], sizes: dict[str, int]) -> int | OutOfMemoryError:
    try:
        return num_cache_blocks(places, **sizes)
    except OutOfMemoryError as error:
        return error


@given(st.lists(PLACES, min_size=1, max_size=4), SIZES)
def test_the_budget_is_kept_and_the_longest_sequence_fits_or_it_is_refused(places, sizes) -> None:
    found = in_all(places, sizes)
    least = -(-sizes["max_model_len"] // sizes["block_size"])
    if isinstance(found, int):
        assert least <= found <= least * sizes["max_num_seqs"]
        for p in places:
            share = 1.0 if p.utilization is None else p.utilization
            assert p.taken_bytes + found * p.bytes_per_block <= p.total_bytes * share
        return
    assert any(p.taken_bytes + least * p.bytes_per_block > p.total_bytes * (p.utilization or 1.0) for p in places)


@given(st.lists(PLACES, min_size=1, max_size=4), SIZES)
def test_as_many_blocks_as_fit_are_used(places, sizes) -> None:
    found = in_all(places, sizes)
    if isinstance(found, int) and found < -(-sizes["max_model_len"] // sizes["block_size"]) * sizes["max_num_seqs"]:
        assert any(p.cache_bytes < (found + 1) * p.bytes_per_block for p in places)


@given(PLACES, st.integers(0, 50 * GIB), SIZES)
def test_more_free_memory_never_gives_fewer_blocks(tight, freed, sizes) -> None:
    roomy = replace(tight, used_bytes=max(tight.used_bytes - freed, 0))
    fewer, more = in_all([tight], sizes), in_all([roomy], sizes)
    assert not isinstance(fewer, int) or (isinstance(more, int) and more >= fewer)


@given(st.lists(PLACES, min_size=1, max_size=4), SIZES)
def test_every_way_out_that_a_refusal_names_works_and_the_length_is_the_longest(places, sizes) -> None:
    error = in_all(places, sizes)
    if isinstance(error, int):
        return
    said = str(error)
    assert "\n" not in said and re.search(r"needs \S+ [MG]iB on the GPU and \S+ [MG]iB are there", said)
    shorter = re.search(r"lower --max-model-len to (\d+)", said)
    most = min(p.blocks() for p in places) * sizes["block_size"]
    assert (shorter is not None) == (most > 0)
    if shorter is not None:
        assert int(shorter[1]) == most < sizes["max_model_len"]
        if most >= 2:
            assert num_cache_blocks(places, **sizes | {"max_model_len": most}) >= 1
        assert isinstance(in_all(places, sizes | {"max_model_len": most + 1}), OutOfMemoryError)
    higher = re.search(r"raise --gpu-memory-utilization to (\S+?),", said)
    if higher is not None:
        raised = [p if p.utilization is None else replace(p, utilization=float(higher[1])) for p in places]
        assert float(higher[1]) <= 0.99 and num_cache_blocks(raised, **sizes) >= 1


def test_a_refusal_says_what_is_needed_what_is_there_and_what_would_fit() -> None:
    gpu = place(80 * GIB, 64 * GIB, 0.9, usage(4 * GIB, GIB, 4 << 20))
    with pytest.raises(OutOfMemoryError) as caught:
        num_cache_blocks([gpu], block_size=16, max_model_len=32768, max_num_seqs=8)
    assert str(caught.value) == (
        "a KV cache for max_model_len=32768 needs 8.0 GiB on the GPU and 3072 MiB are there for it (of 80.0 GiB x "
        "gpu_memory_utilization 0.9: 5.0 GiB for the largest pass, 64.0 GiB in use by weights and others); lower "
        "--max-model-len to 12288 or less, or raise --gpu-memory-utilization to 0.97, or lower "
        "--max-num-batched-tokens or --max-num-seqs, or use more GPUs (--target-tp, --draft-tp)"
    )
    full = place(GIB, 2 * GIB, None)
    with pytest.raises(OutOfMemoryError, match=r"0 MiB are there for it; use a smaller model"):
        num_cache_blocks([full], block_size=16, max_model_len=64, max_num_seqs=1)


def test_colocated_shards_share_what_is_left_of_their_gpu() -> None:
    target, draft = usage(2 * GIB, 0, 3 << 20), usage(GIB, 0, 1 << 20)
    together = place(100 * GIB, 50 * GIB, 0.9, target, draft)
    assert together.cache_bytes == pytest.approx(37 * GIB, abs=2)
    assert together.blocks() == together.cache_bytes // (4 << 20)


def test_the_fewest_shards_that_fit_are_named() -> None:
    assert tensor_parallel_size_for(62 * GIB, 70 * GIB, 64) == 1
    assert tensor_parallel_size_for(140 * GIB, 70 * GIB, 64) == 2
    assert tensor_parallel_size_for(141 * GIB, 70 * GIB, 64) == 3
    assert tensor_parallel_size_for(141 * GIB, GIB, 64) is None
    assert tensor_parallel_size_for(1, 0, 64) is None
    assert (size(300 << 20), size(5 * GIB)) == ("300 MiB", "5.0 GiB")


PASSES = st.builds(
    PassSize,
    max_tokens=st.integers(1, 5000),
    max_sequences=st.integers(1, 300),
    rows_per_sequence=st.integers(1, 33),
    max_context=st.integers(1, 40_000),
)


@given(PASSES, st.integers(1, 64))
def test_the_largest_pass_has_all_tokens_all_rows_and_fits_its_blocks(bounds: PassSize, block_size: int) -> None:
    shares = bounds.shares()
    rows = min(bounds.rows_per_sequence, bounds.max_context)
    assert len(shares) == bounds.max_sequences and all(outputs == rows <= tokens for tokens, outputs in shares)
    most = bounds.max_sequences * bounds.max_context
    assert sum(tokens for tokens, _ in shares) == min(max(bounds.max_tokens, bounds.max_sequences * rows), most)
    num_blocks = -(-max(tokens for tokens, _ in shares) // block_size) + 1
    for (tokens, outputs), entry in zip(
        shares, entries_of(shares, bounds.max_context, block_size, num_blocks), strict=True
    ):
        assert (len(entry.tokens), entry.num_outputs) == (tokens, outputs)
        assert entry.start + tokens <= bounds.max_context
        assert len(entry.blocks) * block_size >= entry.start + tokens
        assert min(entry.blocks) >= 0 and max(entry.blocks) < num_blocks


def loaded(path: Path, group: ThreadGroup) -> LoadedModel:
    return load_model(
        target_model=str(path),
        draft_model=None,
        cache_dir="",
        role="target",
        rank=group.rank,
        group=group,
        dtype="float32",
        device=torch.device("cpu"),
        attention_backend="torch",
        block_size=16,
        on_layer_loaded=lambda done, total: None,
    )


@pytest.mark.parametrize("tp", [1, 3])
def test_the_warm_up_runs_the_pass_on_every_rank_and_hands_over_its_logits(tiny_dirs, tp: int) -> None:
    bounds = PassSize(max_tokens=100, max_sequences=5, rows_per_sequence=4, max_context=500)

    def work(group: ThreadGroup) -> tuple[int, list[tuple[tuple[int, ...], list[int], bool]]]:
        model = loaded(tiny_dirs[0], group)
        judged: list[tuple[tuple[int, ...], list[int], bool]] = []

        def judge(logits_RV: torch.Tensor, counts: list[int]) -> None:
            judged.append((tuple(logits_RV.shape), list(counts), bool(logits_RV.isfinite().all())))

        taken = warm_up(model, group, bounds, block_size=16, num_valid=64, judge=judge)
        return taken, judged

    for taken, judged in on_ranks(tp, work):
        assert taken == 0, "on a CPU nothing is measured"
        ((shape, counts, finite),) = judged
        assert shape[0] == 20 and counts == [4] * 5 and finite


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("role", "rows_per_sequence"), [("target", 4), ("draft", 1)])
def test_the_warm_up_samples_as_the_rounds_do(tiny_dirs, role: Role, rows_per_sequence: int, tp: int) -> None:
    bounds = PassSize(max_tokens=16, max_sequences=2, rows_per_sequence=rows_per_sequence, max_context=64)

    def work(group: ThreadGroup) -> int:
        model = loaded(tiny_dirs[0], group)
        judge = heaviest_sampling(role, TorchSampler(group, model.transformer.vocab_sizes, 60))
        return warm_up(model, group, bounds, block_size=16, num_valid=60, judge=judge)

    assert on_ranks(tp, work) == [0] * tp


def test_a_pass_that_does_not_fit_is_refused_with_its_size(tiny_dirs) -> None:
    def judge(logits_RV: torch.Tensor, counts: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def work(group: ThreadGroup) -> None:
        bounds = PassSize(max_tokens=100, max_sequences=5, rows_per_sequence=4, max_context=500)
        warm_up(loaded(tiny_dirs[0], group), group, bounds, block_size=16, num_valid=64, judge=judge)

    with pytest.raises(OutOfMemoryError, match=r"a pass of 100 tokens, 20 of them with logits.*--max-num-seqs"):
        on_ranks(1, work)
