"""The device's twins of the state machine: ``advance`` does what ``transition`` does, steps feed like a loop."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pearl_ray.core.phases import Node, Round, SequenceState, transition
from pearl_ray.kernels.advance import RoundInput, RoundState, place
from pearl_ray.kernels.draft_step import StepState
from pearl_ray.kernels.sampler import RowDraws
from tests.device_state import ADVANCE, DEVICE, FEED

BLOCK_SIZE = 4
WIDEST = 6


def columns(count: int, filler: int = 0) -> RowDraws:
    kinds = (torch.int64, torch.int32, torch.int32, torch.float32, torch.int32, torch.float64, torch.float32)
    return RowDraws(*(torch.full((count,), filler, dtype=kind, device=DEVICE) for kind in kinds))


@st.composite
def batches(draw):
    """Sequences that decode: (width, pending tokens, committed, verdict is a rejection at or all accepted, drafted)."""
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        width = draw(st.integers(0, WIDEST))
        num_pending = draw(st.sampled_from([0, width - 1])) if width else 0
        tokens = st.integers(0, 60)
        pending = [draw(tokens) for _ in range(num_pending)]
        drafted = [draw(tokens) for _ in range(width)]
        committed = draw(st.integers(3, 30))
        accepted = draw(st.integers(0, num_pending + 1)) if width else 0
        token = -1 if width and accepted == num_pending + 1 else draw(tokens)
        sequences.append((width, pending, drafted, committed, accepted, token))
    return sequences


def on_device(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@given(batches(), st.integers(0, 3), st.integers(0, 5))
def test_a_verdict_moves_the_device_as_transition_moves_the_host(sequences, spare_seqs, spare_rows):
    count = len(sequences)
    widths, pendings, drafted, committed, accepted, tokens = zip(*sequences, strict=True)
    expected = []
    for width, pending, made, length, passed, token in sequences:
        state = SequenceState(2, length, 100, width, tuple(map(Node, pending)), target_kv=length - 1)
        nodes = tuple(map(Node, made))
        tested = len(pending) + 1 if width else 0
        round_ = Round(len(pending) + 1, 1, nodes, tested, passed, token)
        after, commit = transition(state, round_)
        expected.append((after, commit.tokens[-1]))
    rows = sum(len(after.pending) + 1 for after, _ in expected)

    padded = torch.full((count, WIDEST), -7, dtype=torch.int32, device=DEVICE)
    drafted_SW, pending_SW = padded.clone(), padded.clone()
    for s in range(count):
        drafted_SW[s, : widths[s]] = on_device(drafted[s])
        pending_SW[s, : len(pendings[s])] = on_device(pendings[s])
    draws = columns(count)
    draws.seeds.copy_(torch.arange(count) + 2**40)
    draws.temperatures.copy_(torch.arange(count) / 4)
    draws.top_ps.copy_(torch.arange(count) / 8)
    lanes = list(range(count))[::-1]
    tables = torch.randperm(count * 32, device=DEVICE).int().reshape(count, 32)
    state = RoundState(
        on_device(committed),
        on_device([0] * count),
        on_device([len(p) for p in pendings]),
        pending_SW,
        on_device(widths),
        on_device(lanes),
        draws,
    )
    num_rows, num_seqs = rows + spare_rows, count + spare_seqs
    following = RoundInput(
        *(torch.full((num_rows,), -9, dtype=torch.int32, device=DEVICE) for _ in range(3)),
        torch.full((num_seqs + 1,), -9, dtype=torch.int32, device=DEVICE),
        torch.full((num_seqs,), -9, dtype=torch.int32, device=DEVICE),
        torch.full((num_rows + 1,), -9, dtype=torch.int32, device=DEVICE),
        torch.full((num_seqs,), -9, dtype=torch.int64, device=DEVICE),
        columns(num_rows, -9),
    )
    ADVANCE(state, on_device(accepted), on_device(tokens), drafted_SW, tables, BLOCK_SIZE, following)

    at = 0
    for s, (after, newest) in enumerate(expected):
        kept = [node.token for node in after.pending]
        assert int(state.committed[s]) == after.num_committed and int(state.newest[s]) == newest
        assert int(state.num_pending[s]) == len(kept) and state.pending_SW[s, : len(kept)].tolist() == kept
        end = at + len(kept) + 1
        assert int(following.query_start_S1[s]) == at
        assert int(following.context_lens[s]) == after.num_committed + len(kept)
        assert following.token_ids[at:end].tolist() == [newest, *kept]
        positions = list(range(after.num_committed - 1, after.num_committed + len(kept)))
        assert following.positions[at:end].tolist() == positions
        table = tables[lanes[s]].tolist()
        assert following.slots[at:end].tolist() == [
            table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions
        ]
        assert following.tested[at:end].tolist() == [*kept, -1]
        assert int(following.newest_rows[s]) == (end - 1 if widths[s] else num_rows)
        assert following.draws.positions[at:end].tolist() == [p + 1 for p in positions]
        for name in ("seeds", "samples", "temperatures", "top_ks", "top_ps", "min_ps"):
            assert (getattr(following.draws, name)[at:end] == getattr(draws, name)[s]).all()
        at = end
    assert following.query_start_S1[count:].tolist() == [at] * (spare_seqs + 1)
    assert following.context_lens[count:].tolist() == [0] * spare_seqs
    assert following.newest_rows[count:].tolist() == [num_rows] * spare_seqs
    assert following.slots[at:].tolist() == following.tested[at:num_rows].tolist() == [-1] * spare_rows


def test_the_newest_drafted_token_is_put_where_it_is_tested():
    tested = on_device([4, -1, -1, -1, -1])  # two sequences, one of AR, and nobody's entry at the end
    place(tested, on_device([1, 2, 4], torch.int64), on_device([[8, 9], [5, 6], [7, 7]]))
    assert tested.tolist()[:4] == [4, 8, 5, -1]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), min_size=1, max_size=5), st.data())
def test_steps_feed_each_other_and_stop_writing_at_their_limits(sequences, data):
    count, steps = len(sequences), max(limit for limit, _ in sequences)
    lanes = list(range(count))[::-1]
    tables = torch.randperm(count * 16, device=DEVICE).int().reshape(count, 16)
    limits, lengths = zip(*sequences, strict=True)
    draws = columns(count)
    draws.positions.copy_(on_device(lengths))
    state = StepState(
        on_device([0] * count),
        on_device([length - 1 for length in lengths]),
        on_device([-9] * count),
        on_device([0] * count),
        on_device(limits),
        on_device(lanes),
        on_device([0]),
        torch.full((steps, count), -9, dtype=torch.int32, device=DEVICE),
        draws,
    )
    made = np.array([[data.draw(st.integers(0, 60)) for _ in range(count)] for _ in range(steps)])
    for step in range(steps):
        FEED(state, on_device(made[step].tolist()), tables, BLOCK_SIZE)
        assert state.token_ids.tolist() == made[step].tolist()
        for s, (limit, length) in enumerate(sequences):
            position = length + min(step, limit - 2) if limit > 1 else length - 1
            goes_on = step + 1 < limit
            block = int(tables[lanes[s], position // BLOCK_SIZE])
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            assert int(state.slots[s]) == (slot if goes_on else -1)
            assert int(state.positions[s]) == position and int(state.context_lens[s]) == position + 1
            assert int(draws.positions[s]) == length + step + 1
    assert state.window_WS.tolist() == made.tolist()
