"""One rank of a causal language model: a varlen batch in, hidden states and this rank's logits out.

Knows the order of the layers and where the ranks sum. Families differ by the switches of ``ModelConfig`` alone
(``families.py``). Knows nothing of requests, sampling, graphs, or where weights come from.

Shapes: T tokens of the pass, R of them wanted, D model width, V this rank's vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pearl_ray.core.batch import ForwardBatch
from pearl_ray.core.comm import Group
from pearl_ray.kernels.backend import AttentionBackend
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.layers import MLP, Attention, ForwardContext, Linear, Loader, RMSNorm
from pearl_ray.model.rope import inverse_frequencies, rope_tables
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.source import WeightSource


class Layer:
    """Norm, attention, norm, MLP, with the residual stream around them."""

    def __init__(self, config: ModelConfig, attention: Attention, mlp: MLP, loader: Loader, prefix: str) -> None:
        eps = config.rms_norm_eps
        self.input_norm = RMSNorm(loader.load(f"{prefix}.input_layernorm.weight"), eps)
        self.attention = attention
        self.post_norm = RMSNorm(loader.load(f"{prefix}.post_attention_layernorm.weight"), eps)
        self.mlp = mlp


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
    ) -> None:
        """Loads this rank's slices of the weights, cast to ``dtype``; ``on_layer_loaded(done, total)`` after each.

        Raises:
            ModelLoadError: (the source's) a tensor is missing or its file breaks off.
        """
        assert group.rank == rank and group.size == plan.tp_size
        self.config, self.plan, self.dtype, self.device = config, plan, dtype, torch.device(device)
        self.vocab_sizes = plan.vocab_sizes
        self._shard, self._group, self._backend = plan.shards[rank], group, attention
        self.vocab_start = self._shard.vocab.start
        loader = Loader(source, dtype, self.device)
        angle_dtype = torch.promote_types(dtype, torch.float32)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, angle_dtype).to(self.device)
        vocab_rows = slice(self._shard.vocab.start, self._shard.vocab.stop)
        self._embedding = loader.load("model.embed_tokens.weight", vocab_rows)
        self._layers: list[Layer] = []
        for index in range(config.num_layers):
            prefix = f"model.layers.{index}"
            attention_block = Attention(config, self._shard, loader, f"{prefix}.self_attn", attention)
            mlp = MLP(config, self._shard, loader, f"{prefix}.mlp")
            self._layers.append(Layer(config, attention_block, mlp, loader, prefix))
            if on_layer_loaded is not None:
                on_layer_loaded(index + 1, config.num_layers)
        self._final_norm = RMSNorm(loader.load("model.norm.weight"), config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self._lm_head = Linear(self._embedding if tied else loader.load("lm_head.weight", vocab_rows))

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Writes the batch's keys and values to ``cache`` and returns the wanted rows after the final norm, ``[R, D]``.

        Collective: 2 sums over the ranks per layer and one for the embedding. Rows whose slot is -1 are unspecified.
        """
        x_TD = self._embed(batch.token_ids_T)
        cos, signed_sin = rope_tables(batch.positions_T, self._frequencies, self.dtype)
        metadata = self._backend.prepare(
            batch, block_size=cache.block_size, q_to_kv=self._shard.q_to_kv, dtype=self.dtype
        )
        context = ForwardContext(cos, signed_sin, metadata)
        reduce = self._group.all_reduce_
        for layer, k_cache, v_cache in zip(self._layers, cache.k, cache.v, strict=True):
            x_TD += reduce(layer.attention(layer.input_norm(x_TD), k_cache, v_cache, context))
            x_TD += reduce(layer.mlp(layer.post_norm(x_TD)))
        return self._final_norm(x_TD.index_select(0, batch.output_rows_R))

    def local_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary, ``[R, V]`` in the model's dtype; not collective."""
        return self._lm_head(hidden_RD)

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self._group.size == 1:
            return F.embedding(token_ids_T, self._embedding)
        local_T = token_ids_T - self.vocab_start
        elsewhere_T = (local_T < 0) | (local_T >= len(self._shard.vocab))
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self._embedding)
        return self._group.all_reduce_(x_TD.masked_fill_(elsewhere_T[:, None], 0))
