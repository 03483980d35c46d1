"""What a pass of fixed shape does before its layers, in torch: its rows' slots and embeddings, its block tables.

Knows device tensors of a pass; knows no batches, no layers. ``begin_pass_kernel`` does it all in one launch.

Shapes: T rows and S sequences of the pass, padding included; L lanes, B blocks of a table; V ids, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PassInput(NamedTuple):
    """What lies in device tensors, as ``StaticBatch`` has it.

    Attributes:
        lanes_S: which of the tables is each sequence's, in any order; None: the table of its own number.
        block_size: tokens.
    """

    token_ids_T: torch.Tensor
    slots_T: torch.Tensor
    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    tables_LB: torch.Tensor
    lanes_S: torch.Tensor | None
    block_size: int


class Begun(NamedTuple):
    """What the layers begin with.

    Attributes:
        slots_T: -1 behind the last sequence.
        tables_SB: of the sequences; entries behind a sequence's keys, and padding's, are unspecified.
        embedded_TD: the rows' embeddings; None where no embedding was given.
        x_TD: their norm, likewise; the torch reference leaves it to the caller.
    """

    slots_T: torch.Tensor
    tables_SB: torch.Tensor
    embedded_TD: torch.Tensor | None
    x_TD: torch.Tensor | None = None


def begin_pass_reference(given: PassInput, embedding_VD: torch.Tensor | None) -> Begun:
    """Slots, tables and embeddings of a pass; never waits.

    Padding rows may hold any id: they are clamped to the vocabulary, for CUDA would end the process for one beyond it.
    """
    row_T = torch.arange(len(given.slots_T), device=given.slots_T.device)
    slots_T = given.slots_T.masked_fill(row_T >= given.query_start_S1[-1], -1)
    tables_SB = given.tables_LB if given.lanes_S is None else given.tables_LB.index_select(0, given.lanes_S)
    if embedding_VD is None:
        return Begun(slots_T, tables_SB, None)
    ids_T = given.token_ids_T.clamp(0, len(embedding_VD) - 1)
    return Begun(slots_T, tables_SB, F.embedding(ids_T, embedding_VD))
