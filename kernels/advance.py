"""From one round's verdict to the next round's input, on the device: the twin of ``core.phases.transition``.

For sequences that decode under `coupled` in PEARL or AR, with room ahead: whoever clips a window (the end of a
sequence, of its blocks, of the token budget) goes through the host. So a target forward can be queued behind the
verdict of the one before it. Knows the state of a batch; knows no models, requests or messages.

Shapes: S sequences, W the widest window, T rows of the next pass, L lanes, B blocks of a lane's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pearl_ray.kernels.sampler import RowDraws


@dataclass(frozen=True, slots=True)
class RoundState:
    """The decoding sequences between two rounds; all tensors of one device, ``[S]`` unless named otherwise.

    Attributes:
        committed: int32, C. newest: int32, x_{C-1}. num_pending: int32, m.
        pending_SW: int32, the first m of each row are drafted and untested.
        widths: int32, w, tokens the draft makes per round; 0 is AR. With w > 0 every round makes exactly w.
        lanes: int32, each sequence's row of the block tables.
        draws: what each sequence's tokens are drawn with (its ``positions`` are unused).
    """

    committed: torch.Tensor
    newest: torch.Tensor
    num_pending: torch.Tensor
    pending_SW: torch.Tensor
    widths: torch.Tensor
    lanes: torch.Tensor
    draws: RowDraws


@dataclass(frozen=True, slots=True)
class RoundInput:
    """A verification pass and what judges it: T rows, compact, sequence after sequence.

    Attributes:
        token_ids, positions, slots: int32 ``[T]``; slot -1 writes nothing.
        query_start_S1, context_lens: int32, each sequence's first row, and its tokens with this pass.
        tested: int32 ``[T + 1]``, the pending token that the row tests; -1 where it tests none, or until :func:`place`
            puts the newest drafted token there. The last entry is nobody's.
        newest_rows: int64 ``[S]``, the row that tests the first token drafted beside the pass; T where none does.
        draws: per row.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start_S1: torch.Tensor
    context_lens: torch.Tensor
    tested: torch.Tensor
    newest_rows: torch.Tensor
    draws: RowDraws


def advance(
    state: RoundState,
    accepted: torch.Tensor,
    tokens: torch.Tensor,
    drafted_SW: torch.Tensor,
    tables_LB: torch.Tensor,
    block_size: int,
    following: RoundInput,
) -> None:
    """Apply a verdict to ``state`` in place, and write the next round's input to ``following``.

    Args:
        accepted, tokens: int32 ``[S]``, the verdict (``Sampler.judge``).
        drafted_SW: int32, what the draft made in the round that was judged.
        tables_LB: int32, block of each lane's every ``block_size`` positions.
        following: sequences beyond S get no rows, rows beyond the last get slot -1.
    """
    if state.committed.is_cuda:
        from pearl_ray.kernels.advance_kernel import advance as launch

        launch(state, accepted, tokens, drafted_SW, tables_LB, block_size, following)
    else:
        advance_reference(state, accepted, tokens, drafted_SW, tables_LB, block_size, following)


def place(tested: torch.Tensor, newest_rows: torch.Tensor, drafted_SW: torch.Tensor) -> None:
    """Let the rows that wait for it test the first token of what was drafted beside the pass; in place."""
    tested.index_copy_(0, newest_rows, drafted_SW[:, 0])


def advance_reference(
    state: RoundState,
    accepted: torch.Tensor,
    tokens: torch.Tensor,
    drafted_SW: torch.Tensor,
    tables_LB: torch.Tensor,
    block_size: int,
    following: RoundInput,
) -> None:
    """:func:`advance` in torch, sequence by sequence; waits for the device."""
    row = 0
    num_rows, draws = len(following.token_ids), following.draws
    for s in range(len(state.committed)):
        committed, pending = int(state.committed[s]), int(state.num_pending[s])
        width, token = int(state.widths[s]), int(tokens[s])
        if token >= 0:  # a replacement, or AR's token: the rest is dropped
            committed, newest, kept = committed + int(accepted[s]) + 1, token, []
        else:
            assert int(accepted[s]) == pending + 1 and width > 0, "all accepted"
            drafted = drafted_SW[s, :width].tolist()
            committed, newest, kept = committed + pending + 1, drafted[0], drafted[1:]
        state.committed[s], state.newest[s], state.num_pending[s] = committed, newest, len(kept)
        state.pending_SW[s, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        following.query_start_S1[s], following.context_lens[s] = row, committed + len(kept)
        following.newest_rows[s] = row + len(kept) if width > 0 else num_rows
        for i, fed in enumerate([newest, *kept]):
            position = committed - 1 + i
            block = int(tables_LB[state.lanes[s], position // block_size])
            following.token_ids[row], following.positions[row] = fed, position
            following.slots[row] = block * block_size + position % block_size
            following.tested[row] = kept[i] if i < len(kept) else -1
            draws.seeds[row], draws.samples[row] = state.draws.seeds[s], state.draws.samples[s]
            draws.positions[row], draws.temperatures[row] = position + 1, state.draws.temperatures[s]
            draws.top_ks[row], draws.top_ps[row] = state.draws.top_ks[s], state.draws.top_ps[s]
            draws.min_ps[row] = state.draws.min_ps[s]
            row += 1
    assert row <= num_rows
    following.query_start_S1[len(state.committed) :] = row
    following.context_lens[len(state.committed) :] = 0
    following.newest_rows[len(state.committed) :] = num_rows
    following.slots[row:], following.tested[row:] = -1, -1
    following.token_ids[row:], following.positions[row:] = 0, 0
