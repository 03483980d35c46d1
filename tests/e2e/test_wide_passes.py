"""Passes with prompts among them run in the few wide shapes that have graphs: nothing is launched by hand, same text.

On the CPU, where a graph's function is called instead of replayed.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pearl_ray.core.params import SamplingParams
from pearl_ray.model.graphs import GraphPool
from pearl_ray.model.passes import CHUNK_ROWS, PassRunner, Shape
from tests.local_engine import LocalEngine

LENGTHS = (70, 20, 3, 150, 33, 9)


@pytest.fixture
def pools(monkeypatch) -> dict[GraphPool, tuple[set[object], list[object]]]:
    """By pool what was captured, and what ran without."""
    seen: dict[GraphPool, tuple[set[object], list[object]]] = {}

    def of(pool):
        return seen.setdefault(pool, (set(), []))

    def run(pool, key, function):
        if key not in of(pool)[0]:
            of(pool)[1].append(key)
        function()

    monkeypatch.setattr(GraphPool, "capture", lambda pool, key, _: of(pool)[0].add(key))
    monkeypatch.setattr(GraphPool, "has", lambda pool, key: key in of(pool)[0])
    monkeypatch.setattr(GraphPool, "run", run)
    return seen


@pytest.mark.parametrize("mode", ["pearl", "sd", "ar"])
def test_prompts_that_join_a_running_batch_run_as_graphs_and_change_no_text(tiny_dirs, pools, mode):
    chance = random.Random(5)
    prompts = [[chance.randrange(2, 60) for _ in range(n)] for n in LENGTHS]
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=24, ignore_eos=True) for i in range(len(prompts))]
    options = {"max_num_batched_tokens": 96, "max_num_seqs": 5, "window": 4}
    with LocalEngine(tiny_dirs, mode="ar", **options) as engine:
        expected = [request.answers[0].token_ids for request in engine.generate(prompts, params)]
    with LocalEngine(tiny_dirs, mode=mode, on_device=True, **options) as engine:
        found = [request.answers[0].token_ids for request in engine.generate(prompts, params)]
    assert found == expected
    assert pools
    for captured, without in pools.values():
        assert any(isinstance(key, Shape) and key.rows in CHUNK_ROWS and key.query > 8 for key in captured)
        assert without == []


@given(st.lists(st.integers(1, 250), min_size=1, max_size=256), st.sampled_from([1, 5, 40, 256]))
def test_every_pass_of_up_to_256_rows_fits_a_wide_shape(lengths, max_seqs):
    runner = SimpleNamespace(max_seqs=max_seqs, max_rows=512)
    for name in ("shape", "wide"):
        setattr(runner, name, getattr(PassRunner, name).__get__(runner))
    del lengths[max_seqs:]
    while sum(lengths) > CHUNK_ROWS[-1]:
        lengths.pop()
    if not lengths:
        return
    wide = runner.wide(runner.shape(sum(lengths), len(lengths), max(lengths)))
    assert wide.rows >= sum(lengths) and wide.seqs >= len(lengths) and wide.query >= min(max(lengths), wide.rows)
    if max(lengths) <= 128:
        assert wide in set(PassRunner.wide_shapes(runner, 4096))
