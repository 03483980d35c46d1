"""Between two draft steps, on the device: the token just drawn is kept and becomes the next step's input.

So the steps of a window feed each other without the host. Knows positions and blocks; knows no models or verdicts.

Shapes: S sequences (padded), W steps at most, L lanes, B blocks of a lane's table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pearl_ray.kernels.sampler import RowDraws


@dataclass(frozen=True, slots=True)
class StepState:
    """One-token-per-sequence input of a draft step; int32 tensors ``[S]`` of one device unless named otherwise.

    Attributes:
        token_ids, positions, slots, context_lens: the pass; slot -1 writes nothing.
        limits: tokens that each sequence is to draft this round; beyond them its rows write nothing and mean nothing.
        lanes: each sequence's row of the block tables.
        step_1: ``[1]``, draws made so far.
        window_WS: every step's tokens.
        draws: per sequence; ``positions`` is that of the token that the next step draws.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    context_lens: torch.Tensor
    limits: torch.Tensor
    lanes: torch.Tensor
    step_1: torch.Tensor
    window_WS: torch.Tensor
    draws: RowDraws


def feed(state: StepState, tokens: torch.Tensor, tables_LB: torch.Tensor, block_size: int) -> None:
    """Keep ``tokens`` (int32 ``[S]``, what was just drawn) and make the next step's input of them; in place."""
    if tokens.is_cuda:
        from pearl_ray.kernels.draft_step_kernel import feed as launch

        launch(state, tokens, tables_LB, block_size)
    else:
        feed_reference(state, tokens, tables_LB, block_size)


def feed_reference(state: StepState, tokens: torch.Tensor, tables_LB: torch.Tensor, block_size: int) -> None:
    """:func:`feed` in torch, on any device; waits for nothing but what indexing by a tensor takes."""
    state.window_WS.index_copy_(0, state.step_1.long(), tokens[None])
    state.token_ids.copy_(tokens)
    goes_on = state.step_1 + 1 < state.limits
    state.positions.add_(goes_on.int())
    blocks = tables_LB[state.lanes.long(), (state.positions // block_size).long()]
    state.slots.copy_(torch.where(goes_on, blocks * block_size + state.positions % block_size, -1))
    state.context_lens.copy_(state.positions + 1)
    state.draws.positions.add_(1)
    state.step_1.add_(1)
