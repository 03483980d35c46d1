"""One rank of a causal language model: a varlen batch in, hidden states and this rank's logits out.

Knows the order of the layers and where the ranks sum. Families differ by the switches of ``ModelConfig`` alone
(``families.py``). Knows nothing of requests, sampling, graphs, or where weights come from.

Shapes: T tokens of the pass, R of them wanted, D model width, V this rank's vocabulary rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.comm import Group, SingleGroup
from pearl_ray.kernels.backend import AttentionBackend
from pearl_ray.kernels.begin_pass import PassInput
from pearl_ray.kernels.ops import LayerOps, choose_layer_ops
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.layers import ForwardContext, Layer, Linear, Loader
from pearl_ray.model.rope import inverse_frequencies, rope_tables
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.source import WeightSource

SETTLED_LAYERS = 8  # in whose pass ways to compute linear maps are timed: more weights than a cache holds
_SPARE_POSITIONS = 1024  # for rows beyond the longest sequence, whose results nobody wants


class Transformer:
    """The weights of one rank, and the forward pass.

    Attributes:
        config, plan, dtype, device: as given.
        vocab_sizes: logits per rank; ``vocab_start``: the id of this rank's first logit.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: ShardPlan,
        rank: int,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        group: Group,
        attention: AttentionBackend[object],
        on_layer_loaded: Callable[[int, int], None] | None = None,
        ops: LayerOps | None = None,
        max_positions: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """Loads this rank's slices of the weights, cast to ``dtype``; ``on_layer_loaded(done, total)`` after each.

        Args:
            ops: what computes the layers; None: the fastest for the device and type.
            max_positions: the longest sequence, for the rotary tables of GPUs; None: the model's.
            deterministic: a row's bits don't depend on what else is in the batch; ``attention`` must be so too.

        Raises:
            ModelLoadError: (the source's) a tensor is missing or its file breaks off.
        """
        assert group.rank == rank and group.size == plan.tp_size
        self.config, self.plan, self.dtype, self.device = config, plan, dtype, torch.device(device)
        self.vocab_sizes = plan.vocab_sizes
        self._shard, self._group, self._backend = plan.shards[rank], group, attention
        self._ops = choose_layer_ops(self.device, dtype, deterministic=deterministic) if ops is None else ops
        assert self._ops.deterministic == deterministic
        self.vocab_start = self._shard.vocab.start
        loader = Loader(source, dtype, self.device)
        angle_dtype = torch.promote_types(dtype, torch.float32)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, angle_dtype).to(self.device)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._ops.reads_tables:
            count = (max_positions or config.max_position_embeddings) + _SPARE_POSITIONS
            cos, signed_sin = rope_tables(torch.arange(count, device=self.device), self._frequencies, dtype)
            self._tables = cos[:, 0], signed_sin[:, 0]
        vocab_rows = slice(self._shard.vocab.start, self._shard.vocab.stop)
        self._embedding = loader.load("model.embed_tokens.weight", vocab_rows)
        self._layers: list[Layer] = []
        for index in range(config.num_layers):
            prefix = f"model.layers.{index}"
            self._layers.append(Layer(config, self._shard, loader, prefix, attention, self._ops))
            if on_layer_loaded is not None:
                on_layer_loaded(index + 1, config.num_layers)
        self._final_norm = loader.load("model.norm.weight")
        tied = config.tie_word_embeddings
        head = self._embedding if tied else loader.load("lm_head.weight", vocab_rows)
        self._lm_head = Linear(self._ops, head)

    def settle(self, num_rows: int) -> None:
        """Measures how each linear map is fastest for up to so many rows. Once, before a forward is captured.

        Not collective. Seconds on a GPU, nothing on a CPU.
        """
        weights = [linear.weight for layer in self._layers for linear in layer.linears]
        gate_ups = [layer.mlp.gate_up.weight for layer in self._layers]
        self._ops.settle([*weights, self._lm_head.weight], num_rows, gate_ups)
        if self._backend.name != "torch":  # it can't be captured
            self._ops.settle_within(self._first_layers, weights, gate_ups)

    def _first_layers(self, num_rows: int) -> Callable[[], object]:
        """Launches a pass of so many sequences of a token each through some layers, by this rank alone."""
        some = copy.copy(self)
        some._layers, some._group = self._layers[:SETTLED_LAYERS], SingleGroup()
        num_kv = len(self._shard.kv_heads)
        cache = KVCache(1, 256, len(some._layers), num_kv, self.config.head_dim, self.dtype, self.device)
        row_T = torch.arange(num_rows + 1, dtype=torch.int32, device=self.device)
        none_T, ones_T = torch.zeros_like(row_T[:-1]), torch.ones_like(row_T[:-1])
        # All in one block, each its own slot of it: what they see doesn't matter.
        batch = StaticBatch(none_T, none_T, row_T[:-1], row_T, ones_T, none_T[:, None].contiguous(), None, 1, 256)

        def run() -> object:
            return some.forward(batch, cache)

        return run

    def forward(
        self, batch: ForwardBatch | StaticBatch, cache: KVCache, lanes_S: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Writes the batch's keys and values to ``cache`` and returns the wanted rows after the final norm, ``[R, D]``.

        Collective: 2 sums over the ranks per layer and one for the embedding. Rows whose slot is -1 are unspecified.
        A :class:`StaticBatch` on a GPU is never waited for, and can be captured once the same shape ran before.

        Args:
            lanes_S: of a static batch whose tables are those of all lanes, ``[L, B]``: the row of each sequence's.
        """
        ops, eps = self._ops, self.config.rms_norm_eps
        batch, residual_TD, x_TD = self._begin(batch, cache.block_size, lanes_S)
        context = self._context(batch, cache)
        for index, layer in enumerate(self._layers):
            if index > 0:
                x_TD = ops.rms_norm(x_TD, layer.input_norm, eps, residual_TD)
            x_TD = self._sum(layer.attention(x_TD, cache.k[index], cache.v[index], context))
            x_TD = ops.rms_norm(x_TD, layer.post_norm, eps, residual_TD)
            x_TD = self._sum(layer.mlp(x_TD))
        if batch.output_rows_R is not None:
            x_TD, residual_TD = (rows.index_select(0, batch.output_rows_R) for rows in (x_TD, residual_TD))
        return ops.rms_norm(x_TD, self._final_norm, eps, residual_TD)

    def local_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary, ``[R, V]`` in the model's dtype; not collective."""
        return self._lm_head(hidden_RD)

    def _begin(
        self, batch: ForwardBatch | StaticBatch, block_size: int, lanes_S: torch.Tensor | None
    ) -> tuple[ForwardBatch | StaticBatch, torch.Tensor, torch.Tensor]:
        """The batch with a static one's slots and tables made ready, the embedded rows ``[T, D]``, their first norm."""
        norm_weight, eps = self._layers[0].input_norm, self.config.rms_norm_eps
        if isinstance(batch, StaticBatch):
            rows, tables = (batch.token_ids_T, batch.slots_T), batch.block_tables_SB
            given = PassInput(*rows, batch.query_start_S1, batch.context_lens_S, tables, lanes_S, block_size)
            begun = self._ops.begin_pass(given, self._embedding if self._group.size == 1 else None, norm_weight, eps)
            batch = replace(batch, slots_T=begun.slots_T, block_tables_SB=begun.tables_SB)
            if begun.embedded_TD is not None and begun.x_TD is not None:
                return batch, begun.embedded_TD, begun.x_TD
        embedded_TD = self._embed(batch.token_ids_T)
        return batch, embedded_TD, self._ops.rms_norm(embedded_TD, norm_weight, eps)

    def _context(self, batch: ForwardBatch | StaticBatch, cache: KVCache) -> ForwardContext:
        slots_T, block_size, q_to_kv = batch.slots_T, cache.block_size, self._shard.q_to_kv
        if isinstance(batch, StaticBatch):
            metadata = self._backend.prepare_static(batch, block_size=block_size, q_to_kv=q_to_kv, dtype=self.dtype)
            longest = batch.max_context_len
        else:
            metadata = self._backend.prepare(batch, block_size=block_size, q_to_kv=q_to_kv, dtype=self.dtype)
            longest = max(batch.context_lens)
        slots_T, rows = self._ops.written(slots_T)
        if self._tables is None:
            tables = rope_tables(batch.positions_T, self._frequencies, self.dtype)
            return ForwardContext(*tables, None, slots_T, rows, metadata)
        assert longest <= len(self._tables[0]), f"{longest} positions, tables of {len(self._tables[0])}"
        return ForwardContext(*self._tables, batch.positions_T, slots_T, rows, metadata)

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return F.embedding(token_ids_T, self._embedding)
        local_T = token_ids_T - self.vocab_start
        elsewhere_T = (local_T < 0) | (local_T >= len(self._shard.vocab))
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self._embedding)
        return self._group.all_reduce_(x_TD.masked_fill_(elsewhere_T[:, None], 0))

    def _sum(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The ranks' sum, in place where it can be. NCCL's order of adding depends on the size of the whole tensor."""
        size = self._group.size
        if not self._ops.deterministic or size <= 2 or x_TD.device.type != "cuda":
            return self._group.all_reduce_(x_TD)
        parts = self._group.all_gather(x_TD, [x_TD.shape[1]] * size).chunk(size, dim=1)
        total = parts[0].to(torch.promote_types(x_TD.dtype, torch.float32))
        for part in parts[1:]:
            total = total + part
        return total.to(x_TD.dtype)
