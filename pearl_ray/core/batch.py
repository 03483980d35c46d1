"""What one forward pass of a model reads. Plain tensors; knows nothing of requests.

Shapes: T query tokens of the pass, S sequences in it, R rows whose logits are wanted, B blocks of the longest table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A varlen batch over a paged KV cache.

    Attributes:
        token_ids_T: int64, the query tokens, sequence after sequence.
        positions_T: int64, absolute position of each query token in its sequence.
        slots_T: int64, where each token's K and V go: ``block * block_size + offset``; -1 writes nothing.
        query_start: S + 1 offsets into T (Python ints); sequence s owns ``[query_start[s], query_start[s + 1])``.
        context_lens: S lengths of the KV that exists after this pass, query tokens included; query token i of a
            sequence (from its end) sees positions up to its own.
        block_tables_SB: int64, the cache blocks of each sequence, padded with 0.
        output_rows_R: int64 indices into T, in the order in which the logits are wanted.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_start: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables_SB: torch.Tensor
    output_rows_R: torch.Tensor


@dataclass(frozen=True, slots=True)
class StaticBatch:
    """A pass of fixed shape whose contents lie in device tensors: it can be captured in a CUDA graph and replayed.

    Rows from ``query_start_S1[-1]`` on and sequences without query tokens are padding: what they hold is read by
    nobody, their results are unspecified (may be NaN), and they change nothing else.

    Attributes:
        token_ids_T, positions_T, slots_T: int32 or int64; as in :class:`ForwardBatch`, slot -1 writes nothing.
        query_start_S1: int32, from 0 on, never falling; sequence s owns ``[query_start[s], query_start[s + 1])``.
        context_lens_S: int32, the KV that exists after this pass, query tokens included.
        block_tables_SB: int32; entries behind a sequence's keys aren't read.
        output_rows_R: int64, or None: every row.
        max_query_len, max_context_len: bounds that hold for every replay.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    output_rows_R: torch.Tensor | None
    max_query_len: int
    max_context_len: int
