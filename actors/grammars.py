"""The grammars of the sequences in a batch: one state each, made when first asked for. Knows no logits and no Ray.

A state follows its sequence by itself: it takes what was committed since it was last asked, and a sequence that joins
again after preemption (under a new id) begins with all of its committed output. Sequences without a grammar cost
nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import torch

from pearl_ray.core.replica import BatchSequence
from pearl_ray.core.sampling import Row
from pearl_ray.model.grammar import GrammarCompiler, GrammarState


class Grammars:
    """Of one shard. ``make_compiler`` is called once, when the first sequence with a grammar comes."""

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None
        self._states: dict[int, GrammarState] = {}

    def masked_window(self, sequence: BatchSequence, rows: Sequence[Row], window: Sequence[int]) -> tuple[Row, ...]:
        """The rows with their masks; row i follows the committed tokens and ``window[:i]``."""
        masks = self._state(sequence).masks_along(window[: len(rows) - 1])
        return tuple(_masked(row, mask_V) for row, mask_V in zip(rows, masks, strict=True))

    def masked_after(self, sequence: BatchSequence, row: Row, window: Sequence[int]) -> Row:
        """The row behind the committed tokens and ``window`` with its mask; without one where there is none."""
        return _masked(row, self._state(sequence).mask_after(window))

    def drop_absent(self, present: Container[int]) -> None:
        """Forget the sequences that have left the batch."""
        for seq_id in [seq_id for seq_id in self._states if seq_id not in present]:
            del self._states[seq_id]

    def _state(self, sequence: BatchSequence) -> GrammarState:
        """The sequence's state, at the end of its committed tokens."""
        state = self._states.get(sequence.join.seq_id)
        if state is None:
            wanted = sequence.join.params.structured_outputs
            assert wanted is not None
            if self._compiler is None:
                self._compiler = self._make_compiler()
            state = self._states[sequence.join.seq_id] = self._compiler.state(wanted)
        state.accept(sequence.tokens[sequence.join.num_prompt + state.num_accepted :])
        return state


def _masked(row: Row, mask_V: torch.Tensor | None) -> Row:
    """Where min_tokens and the mask leave nothing between them, the mask prevails."""
    if mask_V is None:
        return row
    if len(row.masked):
        left_V = mask_V.clone()
        left_V[[token for token in row.masked if token < len(left_V)]] = False
        if not bool(left_V.any()):
            return replace(row, allowed=mask_V, masked=())
    return replace(row, allowed=mask_V)
