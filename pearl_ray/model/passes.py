"""A model whose small passes have fixed shapes and addresses: filled in one copy, run as CUDA graphs.

What GPUs run; on a CPU the same code runs without graphs, for the tests. Passes too large for it go the plain
runner's way. Knows entries and logits; knows nothing of rounds, verdicts or requests.

Shapes: T rows and S sequences of a pass, both padded up to a bucket; V this rank's vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pearl_ray.core.batch import StaticBatch
from pearl_ray.core.comm import Group
from pearl_ray.model.batching import Entry
from pearl_ray.model.graphs import GraphPool
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.runner import ModelRunner
from pearl_ray.model.staging import Staging
from pearl_ray.model.tables import LaneTables
from pearl_ray.model.transformer import Transformer

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
QUERY_BUCKETS = (1, 8, 32, 128, 512)
# Of passes with prompts among them, which come in too many shapes for a graph of each: rows cost little up to 128.
CHUNK_ROWS = (32, 64, 128, 192, 256)
CHUNK_SEQUENCES = (8, 32, 128, 512)
_SPARE = 512  # tokens of the block tables beyond the longest sequence, at most


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a pass, padded: rows, sequences, the longest sequence's rows."""

    rows: int
    seqs: int
    query: int


class PassRunner(ModelRunner):
    """One rank of a model.

    Attributes:
        tables: the block tables on the device.
        arrays: the pass's input: int32 ``token_ids``, ``positions``, ``slots`` ``[max_rows]``, ``lanes`` and
            ``context_lens`` ``[max_seqs]``, ``query_start`` ``[max_seqs + 1]``.
        logits_RV: what the last pass gave, padding rows included.
        max_context: the longest context that a pass is made for, in tokens.
        graphs: of all passes of this model.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        group: Group,
        *,
        block_size: int,
        num_valid: int,
        max_num_seqs: int,
        max_model_len: int,
        graphs: GraphPool,
        max_rows: int = ROW_BUCKETS[-1],
    ) -> None:
        super().__init__(model, cache, group, block_size=block_size, num_valid=num_valid)
        self.block_size, self.device = block_size, model.device
        self.max_rows = max_rows
        self.max_seqs = min(max_num_seqs, max_rows)
        self.graphs = graphs
        # Sequences that left give their lanes back at the next round: room for as many that join meanwhile.
        # Blocks beyond the longest sequence's: no more than the rotary tables' spare positions.
        blocks = -(-max_model_len // block_size) + max(1, min(8, _SPARE // block_size))
        self.max_context = blocks * block_size
        self.tables = LaneTables(2 * max_num_seqs + 1, blocks, self.device)
        seqs = padded(self.max_seqs, SEQUENCE_BUCKETS)
        layout = {name: ((max_rows,), np.int32) for name in ("token_ids", "positions", "slots")}
        layout |= {"query_start": ((seqs + 1,), np.int32)}
        layout |= {name: ((seqs,), np.int32) for name in ("context_lens", "lanes")}
        self.arrays = Staging(layout, self.device)
        self.logits_RV = torch.zeros((max_rows, model.vocab_sizes[group.rank]), dtype=model.dtype, device=self.device)

    def fits(self, entries: Sequence[Entry]) -> bool:
        """Whether a pass of these entries has a fixed shape."""
        return len(entries) <= self.max_seqs and sum(len(entry.tokens) for entry in entries) <= self.max_rows

    def shape(self, num_rows: int, num_seqs: int, longest: int) -> Shape:
        """The padded shape; sequences and rows within ``max_seqs`` and ``max_rows``."""
        rows = min(padded(num_rows, ROW_BUCKETS), self.max_rows)
        return Shape(rows, padded(num_seqs, SEQUENCE_BUCKETS), min(padded(longest, QUERY_BUCKETS), rows))

    def wide(self, shape: Shape) -> Shape:
        """The shape of passes with prompts that holds this one."""
        seqs = min(padded(shape.seqs, CHUNK_SEQUENCES), padded(self.max_seqs, SEQUENCE_BUCKETS))
        rows = padded(shape.rows, CHUNK_ROWS)
        return Shape(rows, seqs, min(max(padded(shape.query, QUERY_BUCKETS), 32), rows))

    def wide_shapes(self, max_tokens: int) -> Iterator[Shape]:
        """All of :meth:`wide`, of passes of up to so many tokens."""
        most = min(padded(max_tokens, CHUNK_ROWS), CHUNK_ROWS[-1], self.max_rows)
        for rows in (size for size in CHUNK_ROWS if size <= most):
            for seqs in sorted({self.wide(Shape(1, size, 1)).seqs for size in SEQUENCE_BUCKETS}):
                yield from {self.wide(Shape(rows, seqs, query)) for query in (32, 128)}

    def logits(self, entries: Sequence[Entry]) -> torch.Tensor | None:
        """See ``ModelRunner``. The result of a pass that fits is valid until the next."""
        if not entries or not self.fits(entries):
            return super().logits(entries)
        self.queue(self.fill(entries, may_be_wide=True))
        total = sum(len(entry.tokens) for entry in entries)
        wanted = [range(end - entry.num_outputs, end) for entry, end in zip(entries, _ends(entries), strict=True)]
        rows = [row for some in wanted for row in some]
        if not rows:
            return None
        if len(rows) == total:
            return self.logits_RV[:total]
        index = torch.tensor(rows, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        return self.logits_RV.index_select(0, index)

    def fill(self, entries: Sequence[Entry], *, may_be_wide: bool = False) -> Shape:
        """Send the entries to the device; returns their pass's shape. The device must be done with the last fill.

        ``may_be_wide``: where only a wider shape has a graph, that one.
        """
        host, size = self.arrays.host, self.block_size
        at = 0
        longest = 1
        for index, (tokens, start, blocks, _, seq_id) in enumerate(entries):
            count = len(tokens)
            end = at + count
            host["lanes"][index] = self.tables.lane(seq_id, blocks)
            host["query_start"][index], host["context_lens"][index] = at, start + count
            assert (start + count - 1) // size < len(blocks), "blocks don't reach"
            if count == 1:
                block, offset = divmod(start, size)
                host["token_ids"][at], host["positions"][at] = tokens[0], start
                host["slots"][at] = blocks[block] * size + offset
            else:
                where = np.arange(start, start + count)
                some = np.array(blocks[start // size : (end - at + start - 1) // size + 1])
                host["token_ids"][at:end], host["positions"][at:end] = tokens, where
                host["slots"][at:end] = some[where // size - start // size] * size + where % size
                longest = max(longest, count)
            at = end
        shape = self.shape(at, len(entries), longest)
        if may_be_wide and not self.graphs.has(shape) and self.graphs.has(wide := self.wide(shape)):
            shape = wide
        self.pad(at, len(entries), shape)
        self.arrays.upload()
        return shape

    def pad(self, num_rows: int, num_seqs: int, shape: Shape) -> None:
        """Mark what lies behind the pass as padding, on the host."""
        host = self.arrays.host
        host["slots"][num_rows : shape.rows] = -1
        host["token_ids"][num_rows : shape.rows] = 0
        host["positions"][num_rows : shape.rows] = 0
        host["query_start"][num_seqs : shape.seqs + 1] = num_rows
        host["context_lens"][num_seqs : shape.seqs] = 0
        host["lanes"][num_seqs : shape.seqs] = 0

    def queue(self, shape: Shape) -> None:
        """Queue the pass over what the arrays hold; ``logits_RV`` gets a row per row."""
        self.graphs.run(shape, lambda: self._pass(shape))

    def _pass(self, shape: Shape) -> None:
        self.logits_RV[: shape.rows] = self.forward(self.arrays.device, shape)

    def forward(self, arrays: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """This rank's logits ``[R, V]`` of a pass over arrays named like :attr:`arrays`' own; launches, no wait."""
        batch = StaticBatch(
            token_ids_T=arrays["token_ids"][: shape.rows],
            positions_T=arrays["positions"][: shape.rows],
            slots_T=arrays["slots"][: shape.rows],
            query_start_S1=arrays["query_start"][: shape.seqs + 1],
            context_lens_S=arrays["context_lens"][: shape.seqs],
            block_tables_SB=self.tables.tables_LB,
            output_rows_R=None,
            max_query_len=shape.query,
            max_context_len=self.max_context,
        )
        hidden_TD = self._model.forward(batch, self._cache, arrays["lanes"][: shape.seqs])
        return self._model.local_logits(hidden_TD)

    def wait(self, event: torch.cuda.Event | None = None) -> None:
        """Wait on the host for ``event``, or all that was queued; here a missing peer shows, at its deadline."""
        if self.device.type != "cuda":
            return
        if event is None:
            event = torch.cuda.Event()
            event.record()
        synchronize = getattr(self.group, "synchronize", None)
        if synchronize is None:
            event.synchronize()
        else:
            synchronize(event=event)

    def warm_up(self) -> None:
        """Run a pass of each number of sequences and length, without a graph: kernels are compiled now, in no round.

        Of nothing but padding, which leaves the cache alone. Collective.
        """
        most = padded(self.max_seqs, SEQUENCE_BUCKETS)
        self._clear(Shape(self.max_rows, most, 1))
        for longest in QUERY_BUCKETS:
            for seqs in (size for size in SEQUENCE_BUCKETS if size <= most):
                rows = padded(max(longest, seqs), ROW_BUCKETS)
                if rows <= self.max_rows:
                    self._pass(Shape(rows, seqs, min(longest, rows)))
        self.wait()

    def _clear(self, shape: Shape) -> None:
        """Send a pass of nothing but padding."""
        self.pad(0, 0, shape)
        self.arrays.host["query_start"][:] = 0
        self.arrays.upload()

    def capture(self, shapes: Iterable[Shape]) -> None:
        """Make graphs of these shapes, as far as the budget goes. Before the cache holds anything.

        The largest first, whose memory the others use, then from the smallest on, which gain most.
        """
        ordered = sorted(set(shapes), key=lambda s: (s.rows, s.seqs, s.query))
        for shape in ordered[-1:] + ordered[:-1]:
            self._clear(shape)
            self.graphs.capture(shape, lambda shape=shape: self._pass(shape))


def padded(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; beyond the last one the count itself."""
    at = bisect_left(buckets, count)
    return buckets[at] if at < len(buckets) else count


def _ends(entries: Sequence[Entry]) -> list[int]:
    ends, at = [], 0
    for entry in entries:
        at += len(entry.tokens)
        ends.append(at)
    return ends
