"""How many cache blocks fit, and what would fit where they don't: pure arithmetic over what was measured.

Knows bytes; neither devices nor models nor who measured. All shards on one device are counted together, so that two
colocated ones never hand out the same byte twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pearl_ray.core.errors import OutOfMemoryError

_HIGHEST_UTILIZATION = 0.99  # what is suggested at most: the driver and the allocator need a little


@dataclass(frozen=True, kw_only=True)
class ShardUsage:
    """One loaded shard's demands, in bytes.

    Attributes:
        temporary_bytes: the most that a forward pass and its sampling take beyond what stays.
        graph_bytes: set aside for CUDA graphs.
        bytes_per_block: one cache block on this shard, all layers, keys and values.
    """

    temporary_bytes: int
    graph_bytes: int
    bytes_per_block: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a loaded shard found out about itself and its device.

    Attributes:
        total_bytes, used_bytes: the GPU's, all processes together; on a CPU, the host memory that is free, and 0.
    """

    total_bytes: int
    used_bytes: int
    shard: ShardUsage


@dataclass(frozen=True, kw_only=True)
class Place:
    """A GPU, or a node's host memory, with the shards on it.

    Attributes:
        name: for messages, such as "the GPU of node 10.0.0.1".
        total_bytes: what ``utilization`` is a fraction of.
        used_bytes: taken by weights, CUDA contexts, NCCL, other processes: the driver's total - free between passes.
        utilization: how much of the whole may be used; None where ``total_bytes`` is a budget already (host memory).
    """

    name: str
    total_bytes: int
    used_bytes: int
    utilization: float | None
    shards: tuple[ShardUsage, ...]

    @property
    def bytes_per_block(self) -> int:
        """One block of every shard here."""
        return sum(shard.bytes_per_block for shard in self.shards)

    @property
    def taken_bytes(self) -> int:
        """All that isn't cache."""
        return self.used_bytes + sum(shard.temporary_bytes + shard.graph_bytes for shard in self.shards)

    @property
    def cache_bytes(self) -> int:
        """What is left for the cache, 0 at least."""
        share = 1.0 if self.utilization is None else self.utilization
        return max(math.floor(self.total_bytes * share) - self.taken_bytes, 0)

    def blocks(self) -> int:
        """How many blocks of every shard fit."""
        return self.cache_bytes // self.bytes_per_block

    def utilization_for(self, num_blocks: int) -> float | None:
        """The smallest utilization, in hundredths, with which so many blocks fit; None where none does."""
        if self.utilization is None:
            return None
        needed = self.taken_bytes + num_blocks * self.bytes_per_block
        hundredths = math.ceil(100 * needed / self.total_bytes)
        while hundredths <= 100 and math.floor(self.total_bytes * (hundredths / 100)) < needed:
            hundredths += 1
        return hundredths / 100 if hundredths / 100 <= _HIGHEST_UTILIZATION else None


def num_cache_blocks(places: Sequence[Place], *, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks per model: what fits everywhere, but no more than the batch can ever use.

    Raises:
        OutOfMemoryError: not even one sequence of ``max_model_len`` fits; says what is needed, what is there, and which
            settings would fit.
    """
    least = -(-max_model_len // block_size)
    tightest = min(places, key=Place.blocks)
    fits = min(tightest.blocks(), least * max_num_seqs)
    if fits < least:
        raise OutOfMemoryError(_too_small(places, tightest, least, block_size, max_model_len))
    return fits


def _too_small(places: Sequence[Place], tightest: Place, least: int, block_size: int, max_model_len: int) -> str:
    needed = least * tightest.bytes_per_block
    said = (
        f"a KV cache for max_model_len={max_model_len} needs {size(needed)} on {tightest.name} and "
        f"{size(tightest.cache_bytes)} are there for it"
    )
    if tightest.utilization is not None:
        temporary = sum(shard.temporary_bytes + shard.graph_bytes for shard in tightest.shards)
        said += (
            f" (of {size(tightest.total_bytes)} x gpu_memory_utilization {tightest.utilization:g}: {size(temporary)} "
            f"for the largest pass, {size(tightest.used_bytes)} in use by weights and others)"
        )
    ways = []
    if tightest.blocks() > 0:
        ways.append(f"lower --max-model-len to {tightest.blocks() * block_size} or less")
    enough = [place.utilization_for(least) for place in places if place.blocks() < least]
    known = [value for value in enough if value is not None]
    if enough and len(known) == len(enough):
        ways.append(f"raise --gpu-memory-utilization to {max(known):g}")
    if tightest.utilization is not None:
        ways.append("lower --max-num-batched-tokens or --max-num-seqs")
        ways.append("use more GPUs (--target-tp, --draft-tp)")
    return f"{said}; {', or '.join(ways) or 'use a smaller model, or a node with more memory'}"


def tensor_parallel_size_for(weight_bytes: int, free_bytes: int, most: int) -> int | None:
    """The fewest shards of a model that each fit in ``free_bytes``, ``most`` at most; None where there is no such."""
    if free_bytes <= 0:
        return None
    size = max(1, -(-weight_bytes // free_bytes))
    return size if size <= most else None


def size(num_bytes: float) -> str:
    """For messages: MiB below 4 GiB, else GiB."""
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 4 * 2**30 else f"{num_bytes / 2**30:.1f} GiB"
