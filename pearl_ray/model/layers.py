"""The pieces of the transformer that one rank holds: linear maps, norms, attention and MLP blocks, and their loading.

Knows weights by Hugging Face's names and slices them through a ``WeightSource``. Doesn't know who sums over the ranks:
:class:`Attention` and :class:`MLP` return this rank's part of a sum.

Shapes: T tokens, D model width, H query heads, G KV heads, W head width, I MLP columns; all but D are this rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pearl_ray.kernels.backend import AttentionBackend
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.rope import rotate
from pearl_ray.model.sharding import Shard
from pearl_ray.model.source import WeightSource

_PACK_FOR_ROWS = 8  # the batch size oneDNN lays the weights out for; measured flat from 4 to 16


@dataclass(frozen=True)
class Loader:
    """Reads slices of a source's tensors into the dtype and device of the model."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """One tensor, or the slice of it."""
        return self.source.load(name, rows, cols).to(self.device, self.dtype).contiguous()

    def stack(self, parts: list[tuple[str, slice]]) -> torch.Tensor:
        """Row slices of several tensors, one below the other, in one allocation."""
        first = self.source.load(parts[0][0], parts[0][1])
        total = sum(rows.stop - rows.start for _, rows in parts)
        out = torch.empty((total, *first.shape[1:]), dtype=self.dtype, device=self.device)
        at = 0
        for number, (name, rows) in enumerate(parts):
            part = first if number == 0 else self.source.load(name, rows)
            out[at : at + len(part)] = part
            at += len(part)
        return out


class Linear:
    """``x @ weight.T + bias`` with the weight ``[out, in]``.

    On the CPU, float32 weights are laid out once for oneDNN: a handful of rows, a draft window's verification, then
    costs little more than one, where ``F.linear`` (MKL) takes twice as long from the second row on.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self.packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and _can_pack()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS) if self.packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)


def _can_pack() -> bool:
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class RMSNorm:
    """Scales the last dimension to unit mean square, times ``weight``; computed in float32, for float64 in float64.

    The weight multiplies after the cast back, as Hugging Face does.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._compute_dtype = torch.promote_types(weight.dtype, torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(self._compute_dtype)
        scale = wide.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What all layers of one forward share: the rotation of each token, and the attention backend's metadata."""

    cos: torch.Tensor
    signed_sin: torch.Tensor
    attention: object


class Attention:
    """Grouped-query attention over this rank's heads, with q, k and v as one matrix."""

    def __init__(
        self, config: ModelConfig, shard: Shard, loader: Loader, prefix: str, backend: AttentionBackend[object]
    ) -> None:
        width = config.head_dim
        q_rows = slice(shard.q_heads.start * width, shard.q_heads.stop * width)
        kv_rows = slice(shard.kv_heads.start * width, shard.kv_heads.stop * width)
        rows = [("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)]
        weight = loader.stack([(f"{prefix}.{name}.weight", part) for name, part in rows])
        bias = loader.stack([(f"{prefix}.{name}.bias", part) for name, part in rows]) if config.qkv_bias else None
        self.qkv = Linear(weight, bias)
        has_bias = config.output_bias and shard.rank == 0  # once in the sum over the ranks
        self.output = Linear(
            loader.load(f"{prefix}.o_proj.weight", cols=q_rows),
            loader.load(f"{prefix}.o_proj.bias") if has_bias else None,
        )
        self.num_q, self.num_kv, self.width = len(shard.q_heads), len(shard.kv_heads), width
        self.qk_norm: RMSNorm | None = None
        if config.qk_norm:
            q_weight, k_weight = (loader.load(f"{prefix}.{name}.weight") for name in ("q_norm", "k_norm"))
            per_head = torch.cat((q_weight.expand(self.num_q, width), k_weight.expand(self.num_kv, width)))
            self.qk_norm = RMSNorm(per_head, config.rms_norm_eps)
        self.backend = backend

    def __call__(
        self, x_TD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """This rank's part of the output ``[T, D]``; stores the tokens' keys and values on the way."""
        heads = self.qkv(x_TD).view(x_TD.shape[0], self.num_q + 2 * self.num_kv, self.width)
        qk, v_TGW = heads[:, : self.num_q + self.num_kv], heads[:, self.num_q + self.num_kv :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        qk = rotate(qk, context.cos, context.signed_sin)
        q_THW, k_TGW = qk[:, : self.num_q], qk[:, self.num_q :]
        self.backend.store_kv(k_TGW, v_TGW, k_cache, v_cache, context.attention)
        out_THW = self.backend.paged_attention(q_THW, k_cache, v_cache, context.attention)
        return self.output(out_THW.flatten(1))


class MLP:
    """``down(silu(gate(x)) * up(x))`` over this rank's columns, with gate and up as one matrix."""

    def __init__(self, config: ModelConfig, shard: Shard, loader: Loader, prefix: str) -> None:
        part = slice(shard.intermediate.start, shard.intermediate.stop)
        rows = [("gate_proj", part), ("up_proj", part)]
        weight = loader.stack([(f"{prefix}.{name}.weight", part) for name, part in rows])
        bias = loader.stack([(f"{prefix}.{name}.bias", part) for name, part in rows]) if config.mlp_bias else None
        self.gate_up = Linear(weight, bias)
        has_bias = config.mlp_bias and shard.rank == 0  # once in the sum over the ranks
        self.down = Linear(
            loader.load(f"{prefix}.down_proj.weight", cols=part),
            loader.load(f"{prefix}.down_proj.bias") if has_bias else None,
        )

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output ``[T, D]``."""
        gate_TI, up_TI = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate_TI).mul_(up_TI))
