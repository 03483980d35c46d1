"""What GPU rounds stand on, on a CPU: staged arrays, block tables that grow, shapes that cover every batch."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pearl_ray.actors.device import can_capture, verification_shapes
from pearl_ray.core.comm import SingleGroup
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.sampling import Row
from pearl_ray.core.verify import Segment, verify_sharded
from pearl_ray.kernels.sampler import TorchSampler, draws_of, judge_segments
from pearl_ray.model.graphs import GraphFigures, GraphPool
from pearl_ray.model.passes import PassRunner
from pearl_ray.model.staging import Staging
from pearl_ray.model.tables import LaneTables

CPU = torch.device("cpu")


def test_arrays_of_all_types_travel_in_one_copy():
    staging = Staging({"a": ((3,), np.int32), "b": ((2, 2), np.float64), "c": ((5,), np.bool_)}, CPU)
    addresses = [tensor.data_ptr() for tensor in staging.device.values()]
    staging.host["a"][:] = [1, -2, 3]
    staging.host["b"][:] = [[0.5, 1.5], [2.5, 3.5]]
    staging.host["c"][:] = [True, False, True, True, False]
    assert not staging.device["a"].any()
    staging.upload()
    for name, host in staging.host.items():
        assert (staging.device[name].numpy() == host).all() and staging.device[name].dtype == torch.from_numpy(
            host
        ).dtype
    assert [tensor.data_ptr() for tensor in staging.device.values()] == addresses


@given(st.lists(st.tuples(st.sampled_from(["grow", "leave", "again"]), st.integers(0, 3)), max_size=40))
def test_lanes_follow_sequences_that_grow_leave_and_come_again(events):
    tables = LaneTables(8, 16, CPU)
    blocks: dict[int, list[int]] = {}
    fresh = iter(range(1, 1000))
    for kind, seq_id in events:
        if kind == "leave":
            blocks.pop(seq_id, None)
            tables.keep(blocks)
        elif kind == "again" or seq_id not in blocks:
            blocks[seq_id] = [next(fresh)]
        elif len(blocks[seq_id]) < 16:
            blocks[seq_id].append(next(fresh))
        lanes = {seq: tables.lane(seq, table) for seq, table in blocks.items()}
        assert len(set(lanes.values())) == len(lanes)
        for seq, table in blocks.items():
            assert tables.tables_LB[lanes[seq], : len(table)].tolist() == table


def runner_of(max_seqs: int, max_rows: int = 512) -> SimpleNamespace:
    runner = SimpleNamespace(max_seqs=max_seqs, max_rows=max_rows)
    runner.shape = lambda *counts: PassRunner.shape(runner, *counts)
    return runner


@given(st.data(), st.sampled_from([1, 3, 16, 40, 256]), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_every_batch_that_decodes_has_a_shape_that_was_captured(data, max_seqs, max_width):
    shapes = set(verification_shapes(runner_of(max_seqs), max_width))
    rows = data.draw(st.lists(st.integers(1, max_width), min_size=1, max_size=max_seqs))
    while sum(rows) > 512:
        rows.pop()
    shape = runner_of(max_seqs).shape(sum(rows), len(rows), max(rows))
    assert shape in shapes
    assert shape.rows >= sum(rows) and shape.seqs >= len(rows) and shape.query >= max(rows)


def test_passes_through_the_host_are_not_captured():
    assert can_capture(SingleGroup(), "triton", enforce_eager=False)
    assert not can_capture(SingleGroup(), "triton", enforce_eager=True)
    assert not can_capture(SingleGroup(), "torch", enforce_eager=False)
    assert can_capture(SimpleNamespace(size=2, backend="nccl"), "flash-attn", enforce_eager=False)
    assert not can_capture(SimpleNamespace(size=2, backend="gloo"), "triton", enforce_eager=False)


def test_without_a_gpu_functions_are_called_as_they_come():
    pool, calls = GraphPool(CPU, enabled=True, budget_s=9.0, budget_bytes=9), []
    assert not pool.capture("key", lambda: calls.append(0))
    pool.run("key", lambda: calls.append(1))
    assert calls == [1] and (pool.num_called, pool.num_replayed, pool.num_captured) == (1, 0, 0)
    assert pool.figures == GraphFigures(0, 0, 0.0, 0), "nothing was left out, as nothing could be captured"


def test_graphs_that_a_spent_budget_left_out_are_counted_once_each_and_called(caplog):
    pool, calls = GraphPool(torch.device("cuda"), enabled=True, budget_s=0.0, budget_bytes=9), []
    for key in ("one", "other", "one"):  # refused before a device is needed
        assert not pool.capture(key, lambda: calls.append(0))
    pool.run("one", lambda: calls.append(1))
    assert calls == [1] and pool.figures == GraphFigures(0, 2, 0.0, 0)
    with caplog.at_level(logging.INFO, "pearl_ray"):
        pool.log("target")
    assert caplog.messages == ["target: 0 CUDA graphs in 0.0 s and 0.00 GiB, 2 left out by the budget"]


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5, top_k=3),
    SamplingParams(temperature=2.0, top_p=0.5, min_p=0.125),
]


@pytest.mark.parametrize("has_rejection", [False, True])
def test_segments_on_the_device_get_the_hosts_verdicts(has_rejection):
    generator = torch.Generator().manual_seed(5)
    segments = []
    for index in range(12):
        count = index % 4 + 1
        rows = tuple(Row(PARAMS[index % len(PARAMS)], 2**63 + index, 0, 7 + i) for i in range(count))
        tested = tuple(int(t) for t in torch.randint(0, 6, (count - index % 2,), generator=generator))
        rejection = has_rejection and index % 3 == 0
        ids = probs = None
        if rejection and tested:
            ids = np.zeros((len(tested), 64), np.int32)
            probs = np.zeros((len(tested), 64), np.float32)
            ids[:, 0], ids[:, 1] = tested, [(token + 1) % 6 for token in tested]
            probs[:, 0], probs[:, 1] = 0.75, 0.25
        segments.append(Segment(rows, tested, rejection, ids, probs))
    total = sum(len(segment.rows) for segment in segments)
    logits = torch.randn(total, 8, generator=generator) * 2
    sampler = TorchSampler(SingleGroup(), [8], 6)
    accepted, tokens = judge_segments(sampler, logits, segments)
    expected = verify_sharded(logits, segments, SingleGroup(), [8], num_valid=6)
    assert list(zip(accepted.tolist(), tokens.tolist(), strict=True)) == [(v.num_accepted, v.token) for v in expected]


def test_draws_say_which_filters_there_are():
    rows = [Row(params, 1, 0, 0) for params in PARAMS]
    assert not draws_of(rows[:2], CPU).is_filtered
    assert draws_of(rows, CPU).is_filtered and not draws_of(rows, CPU).has_both
    both = Row(SamplingParams(temperature=1.0, top_k=3, top_p=0.5), 1, 0, 0)
    assert draws_of([both], CPU).has_both
    assert not draws_of([Row(SamplingParams(temperature=0.0, top_k=3, top_p=0.5), 1, 0, 0)], CPU).is_filtered
