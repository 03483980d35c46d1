"""From the joint q, k, v product to attention's inputs: q and k normed and turned, k and v stored. One kernel.

Shapes: T tokens, H query heads, G KV heads, D head width. Halves are split as Hugging Face does: element i turns with
element i + D / 2. Computed in float32; the per-head norm (Qwen3) rounds where the model does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pearl_ray.kernels.overlap import OVERLAPPED, follow

_HEADS = 4  # of a program
_MANY_TOKENS = 16


@triton.jit
def _turn_and_store(
    qkv,
    q_out,
    k_cache,
    v_cache,
    slots,
    cos,
    signed_sin,
    table_rows,
    weight,
    eps,
    qkv_stride,
    table_stride,
    table_len,
    num_q,
    num_kv,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BY_POSITION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (tokens, heads / HEADS): heads of one program are all queries, all keys or all values."""
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    head, half = first + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    column, inside = head * WIDTH + half, (head >= 0) & (half < WIDTH // 2)
    if HAS_NORM:
        gain = weight + tl.minimum(head, num_q + num_kv - 1) * WIDTH + half
        gain_low, gain_high = tl.load(gain, mask=inside, other=0.0), tl.load(gain + WIDTH // 2, inside, other=0.0)
    follow()
    x = qkv + token * qkv_stride + column
    low = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    kind: tl.constexpr = q_out.dtype.element_ty
    if first < num_q + num_kv:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / WIDTH + eps)[:, None]
            low = ((low * scale).to(kind) * gain_low).to(tl.float32)
            high = ((high * scale).to(kind) * gain_high).to(tl.float32)
        row = token
        if BY_POSITION:  # a padding row may hold anything: nothing outside the table is read
            row = tl.minimum(tl.maximum(tl.load(table_rows + token).to(tl.int64), 0), table_len - 1)
        angle = row * table_stride + half
        cosine = tl.load(cos + angle, mask=half < WIDTH // 2, other=0.0).to(tl.float32)
        sine = tl.load(signed_sin + angle + WIDTH // 2, mask=half < WIDTH // 2, other=0.0).to(tl.float32)
        low, high = low * cosine - high * sine, high * cosine + low * sine
    if first < num_q:
        to = q_out + token * num_q * WIDTH + column
        tl.store(to, low.to(kind), mask=inside)
        tl.store(to + WIDTH // 2, high.to(kind), mask=inside)
    elif slot >= 0:
        if first < num_q + num_kv:
            to = k_cache + slot * num_kv * WIDTH + column - num_q * WIDTH
        else:
            to = v_cache + slot * num_kv * WIDTH + column - (num_q + num_kv) * WIDTH
        tl.store(to, low.to(kind), mask=inside)
        tl.store(to + WIDTH // 2, high.to(kind), mask=inside)


def turn_and_store(
    qkv_T: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    num_q: int,
    positions_T: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    is_fixed: bool = False,
) -> torch.Tensor:
    """Returns the turned queries ``[T, H, D]``; turned keys, and values, go to their slots (-1 writes nothing).

    Args:
        qkv_T: ``[T, (H + 2 G) D]``.
        cos, signed_sin: ``rope_tables``' ``[T, 1, D]``; or tables ``[L, D]`` of all positions, with ``positions_T``,
            which are clamped to them.
        norm_weight: ``[H + G, D]``, RMSNorm's weight of every query and key head.
        is_fixed: a token's bits don't depend on how many tokens there are.
    """
    num_kv, width = k_cache.shape[2], k_cache.shape[3]
    num_tokens = qkv_T.shape[0]
    assert qkv_T.shape[1] == (num_q + 2 * num_kv) * width and qkv_T.stride(1) == 1
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and cos.stride() == signed_sin.stride()
    q_out = torch.empty((num_tokens, num_q, width), dtype=qkv_T.dtype, device=qkv_T.device)
    # One head each is quickest for a few tokens; many programs would take turns.
    many = num_tokens >= _MANY_TOKENS and not is_fixed and num_q % _HEADS == num_kv % _HEADS == 0
    heads = _HEADS if many else 1
    _turn_and_store[(num_tokens, (num_q + 2 * num_kv) // heads)](
        qkv_T,
        q_out,
        k_cache,
        v_cache,
        slots_T,
        cos,
        signed_sin,
        positions_T if positions_T is not None else slots_T,
        norm_weight if norm_weight is not None else qkv_T,
        eps,
        qkv_T.stride(0),
        cos.stride(0),
        cos.shape[0],
        num_q,
        num_kv,
        WIDTH=width,
        HALF=triton.next_power_of_2(width // 2),
        BY_POSITION=positions_T is not None,
        HAS_NORM=norm_weight is not None,
        HEADS=heads,
        num_warps=1,
        **OVERLAPPED,
    )
    return q_out


def turn_and_store_reference(
    qkv_T: torch.Tensor,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    num_q: int,
    positions_T: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """:func:`turn_and_store` in torch, in float32."""
    num_kv, width = k_cache.shape[2], k_cache.shape[3]
    heads = qkv_T.view(len(qkv_T), num_q + 2 * num_kv, width)
    qk = heads[:, : num_q + num_kv].float()
    if norm_weight is not None:
        qk = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + eps)
        qk = (qk.to(qkv_T.dtype) * norm_weight).float()
    if positions_T is not None:
        positions_T = positions_T.clamp(0, len(cos) - 1)
        cos, signed_sin = cos[positions_T][:, None], signed_sin[positions_T][:, None]
    swapped = torch.cat((qk[..., width // 2 :], qk[..., : width // 2]), dim=-1)
    turned = (qk * cos.float() + swapped * signed_sin.float()).to(qkv_T.dtype)
    rows = (slots_T >= 0).nonzero()[:, 0]
    k_cache.flatten(0, 1)[slots_T[rows]] = turned[rows, num_q:]
    v_cache.flatten(0, 1)[slots_T[rows]] = heads[rows, num_q + num_kv :]
    return turned[:, :num_q]
