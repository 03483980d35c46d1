"""From model names to models: opens the pair, checks that its halves fit each other, loads one rank's part.

The place where paths, the embedded pair, tokenizer, vocabulary check and memory check come together; knows no actors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pearl_ray.core.comm import Group
from pearl_ray.kernels.backend import choose_attention
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.embedded import embedded_draft, embedded_target
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.source import WeightSource, num_parameters, open_source
from pearl_ray.model.tokenizer import Tokenizer, load_tokenizer, takes_vocabulary_from_target
from pearl_ray.model.transformer import Transformer
from pearl_ray.model.vocabulary import check_vocabularies

Role = Literal["draft", "target"]
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Models:
    """The pair as its files describe it; no weights are read yet.

    Attributes:
        parameters: numbers per model.
        num_valid: per model, the ids that may be chosen: the target's are its tokenizer's, whatever the draft knows.
    """

    configs: Mapping[Role, ModelConfig]
    parameters: Mapping[Role, int]
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    num_valid: Mapping[Role, int]

    @property
    def max_model_len(self) -> int:
        """The longest sequence that both models know positions for."""
        return min(config.max_position_embeddings for config in self.configs.values())

    def weight_bytes(self, role: Role, dtype: str) -> int:
        """What a model's weights take in memory, all ranks together."""
        return self.parameters[role] * DTYPES[dtype].itemsize


def open_models(target: str | None, draft: str | None, cache_dir: str, *, with_draft: bool) -> Models:
    """Read the files' heads and check them against each other.

    Raises:
        ModelLoadError, UnsupportedModelError, VocabularyMismatchError: one line that says which file and what.
    """
    target_path = model_path("target", target, cache_dir)
    source = open_source(target_path)
    tokenizer = load_tokenizer(target_path)
    configs: dict[Role, ModelConfig] = {"target": source.config}
    parameters: dict[Role, int] = {"target": num_parameters(source)}
    num_valid: dict[Role, int] = {"target": min(source.config.vocab_size, len(tokenizer.tokens))}
    if with_draft:
        draft_path = model_path("draft", draft, cache_dir)
        draft_source = open_source(draft_path, fallback=source)
        configs["draft"] = draft_source.config
        parameters["draft"] = num_parameters(draft_source)
        own = tokenizer if takes_vocabulary_from_target(draft_path) else load_tokenizer(draft_path)
        num_valid["draft"] = check_vocabularies(
            tokenizer,
            own,
            target_vocab_size=source.config.vocab_size,
            draft_vocab_size=draft_source.config.vocab_size,
        )
    eos = frozenset(source.config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
    return Models(configs, parameters, tokenizer, eos, num_valid)


def model_path(role: Role, given: str | None, cache_dir: str) -> str | Path:
    """What to open: the user's path or name, or the embedded model's file."""
    if given is not None:
        return given
    return embedded_target(Path(cache_dir)) if role == "target" else embedded_draft()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One rank of a model, its weights in place."""

    transformer: Transformer
    num_kv_heads: int
    dtype: torch.dtype
    device: torch.device

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes of one cache block on this rank, all layers, keys and values."""
        config = self.transformer.config
        return KVCache.bytes_per_block(block_size, config.num_layers, self.num_kv_heads, config.head_dim, self.dtype)

    def make_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """This rank's cache."""
        config = self.transformer.config
        return KVCache(
            num_blocks, block_size, config.num_layers, self.num_kv_heads, config.head_dim, self.dtype, self.device
        )


def load_model(
    *,
    target_model: str | None,
    draft_model: str | None,
    cache_dir: str,
    role: Role,
    rank: int,
    group: Group,
    dtype: str,
    device: torch.device,
    attention_backend: str,
    block_size: int,
    on_layer_loaded: Callable[[int, int], None],
    max_model_len: int | None = None,
    deterministic: bool = False,
) -> LoadedModel:
    """Load one rank's part of the draft or the target.

    ``max_model_len``: the longest sequence there will be, where known. ``deterministic``: see ``Transformer``.
    """
    source = source_of(role, target_model, draft_model, cache_dir)
    plan = ShardPlan.make(source.config, group.size)
    torch_dtype = DTYPES[dtype]
    transformer = Transformer(
        source.config,
        plan,
        rank,
        source,
        dtype=torch_dtype,
        device=device,
        group=group,
        attention=choose_attention(
            attention_backend,
            device,
            head_dim=source.config.head_dim,
            dtype=torch_dtype,
            block_size=block_size,
            deterministic=deterministic,
        ),
        on_layer_loaded=on_layer_loaded,
        max_positions=max_model_len,
        deterministic=deterministic,
    )
    shard = plan.shards[rank]
    return LoadedModel(transformer, len(shard.kv_heads), torch_dtype, device)


def source_of(role: Role, target_model: str | None, draft_model: str | None, cache_dir: str) -> WeightSource:
    """The weights of one model of a pair; a draft may leave some of its tensors to the target."""
    target = open_source(model_path("target", target_model, cache_dir))
    return target if role == "target" else open_source(model_path("draft", draft_model, cache_dir), fallback=target)
