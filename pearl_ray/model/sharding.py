"""Who holds what under tensor parallelism: pure integer ranges, no tensors, no communication.

Any size from 1 to the number of query heads works, without padding: each rank holds a contiguous, possibly uneven
range of query heads, of MLP columns and of the vocabulary. The KV heads that its query heads read are held whole, so
a KV head whose group of query heads straddles two ranks is held by both: memory for a copy, but no work done twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pearl_ray.core.errors import ConfigError
from pearl_ray.model.config import ModelConfig

_ALIGNMENT = 16  # elements a range is a multiple of where the size allows: whole 32-byte sectors in bf16


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part. All ranges are of global indices.

    Attributes:
        q_heads, kv_heads: heads held; KV heads may overlap with the neighbours'.
        q_to_kv: per local query head, the local index of its KV head.
        intermediate: columns of the MLP (rows of gate and up, columns of down).
        vocab: rows of the embedding and of the output layer.
    """

    rank: int
    q_heads: range
    kv_heads: range
    q_to_kv: tuple[int, ...]
    intermediate: range
    vocab: range


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The parts of all ranks of one model."""

    shards: tuple[Shard, ...]

    @property
    def tp_size(self) -> int:
        """How many ranks share the model."""
        return len(self.shards)

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary rows per rank, in rank order."""
        return tuple(len(shard.vocab) for shard in self.shards)

    @staticmethod
    def make(config: ModelConfig, tp_size: int) -> ShardPlan:
        """Splits ``config`` over ``tp_size`` ranks.

        Raises:
            ConfigError: ``tp_size`` is below 1 or above what the model can be split into.
        """
        most = min(config.num_heads, config.intermediate_size, config.vocab_size)
        if isinstance(tp_size, bool) or not isinstance(tp_size, int) or not 1 <= tp_size <= most:
            allowed = f"a whole number from 1 to {most} for this model ({config.num_heads} query heads)"
            raise ConfigError("tensor_parallel_size", tp_size, allowed)
        group = config.num_heads // config.num_kv_heads
        parts = zip(
            split(config.num_heads, tp_size),
            split(config.intermediate_size, tp_size, _ALIGNMENT),
            split(config.vocab_size, tp_size, _ALIGNMENT),
            strict=True,
        )
        shards = []
        for rank, (q_heads, intermediate, vocab) in enumerate(parts):
            kv_heads = range(q_heads.start // group, (q_heads.stop - 1) // group + 1)
            q_to_kv = tuple(head // group - kv_heads.start for head in q_heads)
            shards.append(Shard(rank, q_heads, kv_heads, q_to_kv, intermediate, vocab))
        return ShardPlan(tuple(shards))


def split(total: int, parts: int, alignment: int = 1) -> tuple[range, ...]:
    """``parts`` contiguous ranges that cover ``range(total)``, larger ones first.

    Sizes differ by at most one unit of ``alignment``, which falls back to 1 where ``total`` is no multiple of it or so
    small that a unit would be a large part of a range (below 4 units each).
    """
    unit = alignment if total % alignment == 0 and total // alignment >= 4 * parts else 1
    base, extra = divmod(total // unit, parts)
    bounds = [(base * part + min(part, extra)) * unit for part in range(parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))
