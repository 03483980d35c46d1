"""Cache blocks of one model: who holds which, and which committed prefixes they keep. Knows nothing of tensors.

A block is *held* by one or more sequences (sharing a cached prefix) or *free*. Free blocks that carry a hash stay
findable until they are taken, the longest unused first. Only blocks of committed tokens are ever hashed: what a
draft proposed may be wrong, and a wrong block under a right hash would poison later requests.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = b""


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block: of its tokens and everything before it. SHA-256: a collision would be a wrong answer."""
    return hashlib.sha256(parent + struct.pack(f"<{len(tokens)}I", *tokens)).digest()


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], block_size: int, count: int) -> None:
    """Make ``hashes``, those of the first full blocks of ``tokens``, at least ``count`` long; each is made once."""
    while len(hashes) < count:
        start = len(hashes) * block_size
        hashes.append(block_hash(hashes[-1] if hashes else ROOT, tokens[start : start + block_size]))


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Blocks of a pool: all, held, and prefix-cache tokens asked for and found so far."""

    num_blocks: int
    num_held: int
    queried_tokens: int
    hit_tokens: int


class BlockPool:
    """The blocks of one model's cache.

    Args:
        num_blocks: blocks in all, numbered from 0.
        block_size: tokens per block.
        prefix_caching: whether freed blocks are kept findable.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Free blocks in the order in which they are taken: oldest first, unhashed ones put in front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._queried_tokens = 0
        self._hit_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether ``count`` blocks can be taken now."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks; the caller has asked :meth:`can_allocate`."""
        assert self.can_allocate(count)
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._holders[block] = 1
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]
            blocks.append(block)
        return blocks

    def find_prefix(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """The cached blocks that hold the longest prefix of ``tokens`` of at most ``max_tokens``; takes nothing."""
        found: list[int] = []
        hashes: list[bytes] = []
        while (len(found) + 1) * self.block_size <= max_tokens:
            extend_hashes(hashes, tokens, self.block_size, len(found) + 1)
            more = self.find(hashes[len(found) :])
            if not more:
                break
            found += more
        return found

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest prefix whose blocks have these hashes; takes nothing."""
        found: list[int] = []
        if self.prefix_caching:
            for digest in hashes:
                block = self._block_of.get(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these would leave the free list if they were shared."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int], num_queried: int) -> None:
        """Hold cached blocks; ``num_queried`` tokens were looked up, for the hit rate."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1
        self._queried_tokens += num_queried
        self._hit_tokens += len(blocks) * self.block_size

    def keep(self, block: int, digest: bytes) -> None:
        """Make a held, completely written block of committed tokens findable; the first block of a hash stays."""
        assert self._holders[block] > 0
        if self.prefix_caching and digest not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one hold on each. The last blocks of a sequence are reused first: prefixes are worth more."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, f"block {block} released twice"
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def usage(self) -> PoolUsage:
        """Counts for the metrics."""
        return PoolUsage(self.num_blocks, self.num_blocks - len(self._free), self._queried_tokens, self._hit_tokens)


class Holding:
    """The blocks one sequence holds in one pool, and how far their committed part has been made findable.

    ``hashes``: of the sequence's first full blocks, as far as they have been made; extended here, and shared with
    whoever holds blocks of the same tokens in another pool of the same block size.
    """

    __slots__ = ("_hashes", "_num_kept", "blocks", "pool")

    def __init__(self, pool: BlockPool, hashes: list[bytes] | None = None) -> None:
        self.pool = pool
        self.blocks: list[int] = []
        self._num_kept = 0
        self._hashes = hashes if hashes is not None else []

    @property
    def capacity(self) -> int:
        """Tokens that fit in the blocks held."""
        return len(self.blocks) * self.pool.block_size

    def missing(self, num_tokens: int) -> int:
        """Blocks to take before ``num_tokens`` fit."""
        missing = -(-num_tokens // self.pool.block_size) - len(self.blocks)
        return missing if missing > 0 else 0

    def extend(self, count: int) -> list[int]:
        """Take ``count`` more blocks; returns them."""
        blocks = self.pool.allocate(count)
        self.blocks += blocks
        return blocks

    def start_from(self, cached: Sequence[int], tokens: Sequence[int]) -> int:
        """Begin with cached blocks of the prefix of ``tokens``; returns how many tokens they hold."""
        assert not self.blocks
        self.pool.share(cached, len(tokens))
        self.blocks = list(cached)
        self._num_kept = len(cached)
        return len(cached) * self.pool.block_size

    def keep_committed(self, tokens: Sequence[int], num_written: int) -> None:
        """Make the full blocks among the first ``num_written`` committed tokens findable."""
        if not self.pool.prefix_caching:
            return
        count = num_written // self.pool.block_size
        if count <= self._num_kept:
            return
        extend_hashes(self._hashes, tokens, self.pool.block_size, count)
        for index in range(self._num_kept, count):
            self.pool.keep(self.blocks[index], self._hashes[index])
        self._num_kept = count

    def release(self) -> None:
        """Give everything back."""
        self.pool.release(self.blocks)
        self.blocks = []
