"""Writes keys and values to their slots of the paged cache. Knows slots; knows no sequences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WIDEST = 4096  # columns of one program


@triton.jit
def _store(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_stride_t,
    v_stride_t,
    stride_slot,
    width,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        k_row = tl.load(k + token * k_stride_t + column, mask=inside)
        v_row = tl.load(v + token * v_stride_t + column, mask=inside)
        tl.store(k_cache + slot * stride_slot + column, k_row, mask=inside)
        tl.store(v_cache + slot * stride_slot + column, v_row, mask=inside)


def store_kv(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """Keys and values ``[T, G, D]``, rows may lie apart, into caches ``[blocks, block_size, G, D]``; -1: nowhere."""
    num_tokens, num_kv, head_dim = k_TGD.shape
    for new in (k_TGD, v_TGD):
        assert new.stride(2) == 1 and (num_kv == 1 or new.stride(1) == head_dim)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    width = num_kv * head_dim
    block = min(_WIDEST, triton.next_power_of_2(width))
    _store[(num_tokens, triton.cdiv(width, block))](
        k_TGD, v_TGD, k_cache, v_cache, slots_T, k_TGD.stride(0), v_TGD.stride(0), width, width, BLOCK=block
    )


def store_kv_reference(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """:func:`store_kv` in torch."""
    rows = (slots_T >= 0).nonzero()[:, 0]
    for new, cache in ((k_TGD, k_cache), (v_TGD, v_cache)):
        cache.flatten(0, 1)[slots_T[rows]] = new[rows]
