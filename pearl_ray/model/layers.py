"""The pieces of the transformer that one rank holds: linear maps, attention and MLP blocks, and their loading.

Knows weights by Hugging Face's names and slices them through a ``WeightSource``; what is computed with them is in
``kernels``. Doesn't know who sums over the ranks: :class:`Attention` and :class:`MLP` return this rank's part of a sum.

Shapes: T tokens, D model width, H query heads, G KV heads, W head width, I MLP columns; all but D are this rank's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pearl_ray.kernels.backend import AttentionBackend
from pearl_ray.kernels.ops import LayerOps
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.sharding import Shard
from pearl_ray.model.source import WeightSource, load_into, part_shape


@dataclass(frozen=True)
class Loader:
    """Reads slices of a source's tensors into the dtype and device of the model."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """One tensor, or the slice of it; beside the result the host holds a bounded piece of it at a time."""
        shape = part_shape(self.source.shape(name), rows, cols)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        load_into(self.source, name, out, rows, cols)
        return out

    def stack(self, parts: list[tuple[str, slice]]) -> torch.Tensor:
        """Row slices of several tensors, one below the other, in one allocation."""
        shapes = [part_shape(self.source.shape(name), rows) for name, rows in parts]
        out = torch.empty((sum(s[0] for s in shapes), *shapes[0][1:]), dtype=self.dtype, device=self.device)
        at = 0
        for (name, rows), shape in zip(parts, shapes, strict=True):
            load_into(self.source, name, out[at : at + shape[0]], rows)
            at += shape[0]
        return out


class Linear:
    """``x @ weight.T + bias`` with the weight ``[out, in]``; ``weight`` is kept in the operations' own layout."""

    def __init__(self, ops: LayerOps, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.ops, self.weight, self.bias = ops, ops.lay_out(weight), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What all layers of one forward share.

    Attributes:
        cos, signed_sin, positions_T: the rotation of each token, or tables and where to look (see ``LayerOps``).
        slots_T, rows: where keys and values go (``LayerOps.written``).
        attention: the attention backend's metadata.
    """

    cos: torch.Tensor
    signed_sin: torch.Tensor
    positions_T: torch.Tensor | None
    slots_T: torch.Tensor
    rows: torch.Tensor | None
    attention: object


class Attention:
    """Grouped-query attention over this rank's heads, with q, k and v as one matrix."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        loader: Loader,
        prefix: str,
        backend: AttentionBackend[object],
        ops: LayerOps,
    ) -> None:
        width = config.head_dim
        q_rows = slice(shard.q_heads.start * width, shard.q_heads.stop * width)
        kv_rows = slice(shard.kv_heads.start * width, shard.kv_heads.stop * width)
        rows = [("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)]
        weight = loader.stack([(f"{prefix}.{name}.weight", part) for name, part in rows])
        bias = loader.stack([(f"{prefix}.{name}.bias", part) for name, part in rows]) if config.qkv_bias else None
        self.qkv = Linear(ops, weight, bias)
        has_bias = config.output_bias and shard.rank == 0  # once in the sum over the ranks
        self.output = Linear(
            ops,
            loader.load(f"{prefix}.o_proj.weight", cols=q_rows),
            loader.load(f"{prefix}.o_proj.bias") if has_bias else None,
        )
        self.num_q, num_kv = len(shard.q_heads), len(shard.kv_heads)
        self.norm_weight: torch.Tensor | None = None
        if config.qk_norm:
            q_weight, k_weight = (loader.load(f"{prefix}.{name}.weight") for name in ("q_norm", "k_norm"))
            self.norm_weight = torch.cat((q_weight.expand(self.num_q, width), k_weight.expand(num_kv, width)))
        self.backend, self.ops, self.eps = backend, ops, config.rms_norm_eps

    def __call__(
        self, x_TD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """This rank's part of the output ``[T, D]``; stores the tokens' keys and values on the way."""
        q_THW = self.ops.turn_and_store(
            self.qkv(x_TD),
            context.cos,
            context.signed_sin,
            k_cache,
            v_cache,
            context.slots_T,
            num_q=self.num_q,
            rows=context.rows,
            positions_T=context.positions_T,
            norm_weight=self.norm_weight,
            eps=self.eps,
        )
        out_THW = self.backend.paged_attention(q_THW, k_cache, v_cache, context.attention)
        return self.output(out_THW.flatten(1))


class MLP:
    """``down(silu(gate(x)) * up(x))`` over this rank's columns, with gate and up as one matrix."""

    def __init__(self, config: ModelConfig, shard: Shard, loader: Loader, prefix: str, ops: LayerOps) -> None:
        part = slice(shard.intermediate.start, shard.intermediate.stop)
        rows = [("gate_proj", part), ("up_proj", part)]
        weight = loader.stack([(f"{prefix}.{name}.weight", part) for name, part in rows])
        bias = loader.stack([(f"{prefix}.{name}.bias", part) for name, part in rows]) if config.mlp_bias else None
        self.gate_up = Linear(ops, weight, bias)
        has_bias = config.mlp_bias and shard.rank == 0  # once in the sum over the ranks
        self.down = Linear(
            ops,
            loader.load(f"{prefix}.down_proj.weight", cols=part),
            loader.load(f"{prefix}.down_proj.bias") if has_bias else None,
        )
        self.ops = ops

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output ``[T, D]``."""
        return self.down(self.ops.gate_up_silu(x_TD, self.gate_up.weight, self.gate_up.bias))


class Layer:
    """Attention and MLP, and the weights of the norms before them."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        loader: Loader,
        prefix: str,
        backend: AttentionBackend[object],
        ops: LayerOps,
    ) -> None:
        self.attention = Attention(config, shard, loader, f"{prefix}.self_attn", backend, ops)
        self.mlp = MLP(config, shard, loader, f"{prefix}.mlp", ops)
        self.input_norm = loader.load(f"{prefix}.input_layernorm.weight")
        self.post_norm = loader.load(f"{prefix}.post_attention_layernorm.weight")

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear maps but that to gates and ups."""
        return (self.attention.qkv, self.attention.output, self.mlp.down)
