"""The Triton kernel of a pass's beginning (see ``begin_pass``), with the first norm in it. Knows rows and tables.

A program takes a row (its slot, its embedding, the norm of that), or a part of a sequence's block table. Of a table
only the blocks that hold the sequence's keys are copied; how many those are is known on the device alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.begin_pass import Begun, PassInput
from pearl_ray.kernels.norm import norm_sizes, normed
from pearl_ray.kernels.overlap import OVERLAPPED, follow

_COLUMNS = 1024  # of a table, for one program


@triton.jit
def _begin_row(
    row,
    token_ids,
    slots,
    query_start,
    embedding,
    gain,
    slots_out,
    embedded,
    x,
    num_seqs,
    num_ids,
    embedding_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EMBEDDING: tl.constexpr,
):
    slot = tl.load(slots + row)
    tl.store(slots_out + row, tl.where(row < tl.load(query_start + num_seqs), slot, -1))
    if HAS_EMBEDDING:
        token = tl.minimum(tl.maximum(tl.load(token_ids + row).to(tl.int64), 0), num_ids - 1)
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        own = tl.load(embedding + token * embedding_stride + column, mask=inside, other=0.0)
        to = row.to(tl.int64) * WIDTH + column
        tl.store(embedded + to, own, mask=inside)
        tl.store(x + to, normed(own.to(tl.float32), gain, eps, WIDTH, x.dtype.element_ty), mask=inside)


@triton.jit
def _begin_table(
    part,
    query_start,
    context_lens,
    tables,
    lanes,
    tables_out,
    num_blocks,
    table_stride,
    block_size,
    COLUMNS: tl.constexpr,
):
    parts = tl.cdiv(num_blocks, COLUMNS)
    seq = part // parts
    start = part % parts * COLUMNS
    used = tl.minimum(tl.cdiv(tl.load(context_lens + seq), block_size), num_blocks)
    is_padding = tl.load(query_start + seq) == tl.load(query_start + seq + 1)  # its lane and length may be anything
    if not is_padding and start < used:
        column = start + tl.arange(0, COLUMNS)
        table = tables + tl.load(lanes + seq).to(tl.int64) * table_stride
        own = tl.load(table + column, mask=column < used)
        tl.store(tables_out + seq.to(tl.int64) * num_blocks + column, own, mask=column < used)


@triton.jit(do_not_specialize=["num_rows", "num_seqs"])
def _begin(
    token_ids,
    slots,
    query_start,
    context_lens,
    tables,
    lanes,
    embedding,
    norm_weight,
    slots_out,
    tables_out,
    embedded,
    x,
    num_rows,
    num_seqs,
    num_ids,
    num_blocks,
    table_stride,
    embedding_stride,
    block_size,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_EMBEDDING: tl.constexpr,
):
    """Grid: rows, and behind them, where tables are to be copied, the parts of each sequence's."""
    gain = 0.0
    if HAS_EMBEDDING:
        column = tl.arange(0, BLOCK)
        gain = tl.load(norm_weight + column, mask=column < WIDTH, other=0.0)  # cold, and nobody's output: first
    follow()
    program = tl.program_id(0)
    if program < num_rows:
        _begin_row(
            program, token_ids, slots, query_start, embedding, gain, slots_out, embedded, x, num_seqs, num_ids,
            embedding_stride, eps, WIDTH, BLOCK, HAS_EMBEDDING,
        )  # fmt: skip
    else:
        _begin_table(
            program - num_rows, query_start, context_lens, tables, lanes, tables_out, num_blocks, table_stride,
            block_size, COLUMNS,
        )  # fmt: skip


def begin_pass(given: PassInput, embedding_VD: torch.Tensor | None, norm_weight_D: torch.Tensor, eps: float) -> Begun:
    """As the reference, and the embeddings' norm with the bits of ``norm.rms_norm``; one launch, no wait.

    Without lanes the tables are the given ones.
    """
    num_rows, num_seqs, num_blocks = len(given.slots_T), len(given.context_lens_S), given.tables_LB.shape[1]
    device, width = given.slots_T.device, len(norm_weight_D)
    nothing = norm_weight_D  # in place of what isn't there, and isn't touched
    slots_T = torch.empty((num_rows,), dtype=given.slots_T.dtype, device=device)
    tables_SB, embedded_TD, x_TD = given.tables_LB, None, None
    if given.lanes_S is not None:
        assert given.tables_LB.stride(1) == 1
        tables_SB = torch.empty((num_seqs, num_blocks), dtype=given.tables_LB.dtype, device=device)
    if embedding_VD is not None:
        assert embedding_VD.stride(1) == 1 and embedding_VD.shape[1] == width
        shape, dtype = (num_rows, width), embedding_VD.dtype
        embedded_TD, x_TD = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    block, warps = norm_sizes(width)
    num_parts = 0 if given.lanes_S is None else num_seqs * triton.cdiv(num_blocks, _COLUMNS)
    _begin[(num_rows + num_parts,)](
        given.token_ids_T,
        given.slots_T,
        given.query_start_S1,
        given.context_lens_S,
        given.tables_LB,
        nothing if given.lanes_S is None else given.lanes_S,
        nothing if embedding_VD is None else embedding_VD,
        norm_weight_D,
        slots_T,
        tables_SB,
        nothing if embedded_TD is None else embedded_TD,
        nothing if x_TD is None else x_TD,
        num_rows,
        num_seqs,
        0 if embedding_VD is None else len(embedding_VD),
        num_blocks,
        given.tables_LB.stride(0),
        width if embedding_VD is None else embedding_VD.stride(0),
        given.block_size,
        eps,
        WIDTH=width,
        BLOCK=block,
        COLUMNS=_COLUMNS,
        HAS_EMBEDDING=embedding_VD is not None,
        num_warps=warps,
        **OVERLAPPED,
    )
    return Begun(slots_T, tables_SB, embedded_TD, x_TD)
