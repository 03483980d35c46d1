"""Paged attention and KV store in plain torch: the CPU's backend, and the reference for every kernel.

Knows a batch's offsets, lengths and block tables; knows no requests, no layers, no weights.

Shapes: T query tokens, H query heads, G KV heads, D head width, L keys of one sequence; P = H / G padded query heads
per KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from pearl_ray.core.batch import ForwardBatch, StaticBatch

MAX_CHUNK = 128  # query tokens attended at once: bounds the scores and the mask to MAX_CHUNK x context


@dataclass(frozen=True, slots=True)
class HeadGroups:
    """How query heads line up under their KV heads.

    Under uneven tensor parallelism the first and last KV head may have fewer query heads here than the others. Their
    groups are filled up with repeats, computed and thrown away.

    Attributes:
        size: P, query heads per KV head after filling up.
        num_kv: G.
        pad, unpad: indices that fill up ``[H]`` to ``[G * P]`` and back; None where nothing is to do.
    """

    size: int
    num_kv: int
    pad: torch.Tensor | None
    unpad: torch.Tensor | None

    @staticmethod
    def make(q_to_kv: Sequence[int], device: torch.device) -> HeadGroups:
        """``q_to_kv`` must not decrease and must name every KV head."""
        num_kv = q_to_kv[-1] + 1
        groups = [[head for head, kv in enumerate(q_to_kv) if kv == wanted] for wanted in range(num_kv)]
        assert list(q_to_kv) == sorted(q_to_kv) and all(groups), f"{q_to_kv=} isn't grouped"
        size = max(map(len, groups))
        if all(len(group) == size for group in groups):
            return HeadGroups(size, num_kv, None, None)
        pad = [head for group in groups for head in group + [group[-1]] * (size - len(group))]
        unpad = [kv * size + at for kv, group in enumerate(groups) for at in range(len(group))]
        return HeadGroups(size, num_kv, torch.tensor(pad, device=device), torch.tensor(unpad, device=device))


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's query tokens ``[start, stop)`` and its keys' cache slots (a slice where they lie in a row)."""

    start: int
    stop: int
    slots: slice | torch.Tensor
    context_len: int

    def read(self, flat: torch.Tensor) -> torch.Tensor:
        """The sequence's rows ``[L, G, D]`` of a cache ``[num_slots, G, D]``."""
        # index_select copies whole rows; indexing by a tensor costs many times as much.
        return flat[self.slots] if isinstance(self.slots, slice) else flat.index_select(0, self.slots)


@dataclass(frozen=True, slots=True)
class TorchMetadata:
    """What the layers of one forward share.

    Attributes:
        mask: ``[C * P, max L]``, C the longest chunk: 0 where the last C positions of the longest sequence may look,
            -inf elsewhere. Its lower right corners are the masks of all shorter chunks and contexts. None if every
            sequence has one query token.
        slots_T: where keys and values go, -1: nowhere.
    """

    groups: HeadGroups
    spans: tuple[SequenceSpan, ...]
    mask: torch.Tensor | None
    slots_T: torch.Tensor


class TorchAttention:
    """The backend named 'torch' (see ``AttentionBackend``).

    Deterministic: query tokens are attended one by one, so that a token's bits depend on its keys alone.
    """

    name = "torch"

    def __init__(self, *, deterministic: bool = False) -> None:
        self._chunk = 1 if deterministic else MAX_CHUNK
        self._groups: dict[tuple[tuple[int, ...], torch.device], HeadGroups] = {}

    def prepare(
        self, batch: ForwardBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> TorchMetadata:
        """See ``AttentionBackend``. Reads the block tables on the host: one wait on a GPU."""
        device = batch.token_ids_T.device
        key = (tuple(q_to_kv), device)
        if key not in self._groups:
            self._groups[key] = HeadGroups.make(*key)
        groups = self._groups[key]
        longest = min(max(b - a for a, b in pairwise(batch.query_start)), self._chunk)
        mask = _corner_mask(longest, max(batch.context_lens), groups.size, dtype, device) if longest > 1 else None
        return TorchMetadata(groups, _spans(batch, block_size), mask, batch.slots_T)

    def prepare_static(
        self, batch: StaticBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> TorchMetadata:
        """See ``AttentionBackend``. Reads the batch on the host; padding rows come out as NaN."""
        starts, lengths = batch.query_start_S1.tolist(), batch.context_lens_S.tolist()
        assert starts[0] == 0 and starts[-1] <= len(batch.token_ids_T), f"{starts} of {len(batch.token_ids_T)} rows"
        real = [seq for seq, (a, b) in enumerate(pairwise(starts)) if a < b]
        for seq in real:
            assert starts[seq + 1] - starts[seq] <= batch.max_query_len and lengths[seq] <= batch.max_context_len
        if not real:
            groups = HeadGroups.make(q_to_kv, batch.token_ids_T.device)
            return TorchMetadata(groups, (), None, torch.full_like(batch.slots_T, -1))
        slots_T = batch.slots_T.clone()
        slots_T[starts[-1] :] = -1
        num_blocks = -(-max(lengths[seq] for seq in real) // block_size)
        return self.prepare(
            ForwardBatch(
                batch.token_ids_T,
                batch.positions_T,
                slots_T,
                (0, *(starts[seq + 1] for seq in real)),
                tuple(lengths[seq] for seq in real),
                batch.block_tables_SB[real, :num_blocks].long(),
                torch.empty(0, dtype=torch.int64),
            ),
            block_size=block_size,
            q_to_kv=q_to_kv,
            dtype=dtype,
        )

    def store_kv(
        self,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: TorchMetadata,
    ) -> None:
        """See ``AttentionBackend``."""
        rows = (metadata.slots_T >= 0).nonzero()[:, 0]
        for new, cache in ((k_TGD, k_cache), (v_TGD, v_cache)):
            cache.flatten(0, 1).index_copy_(0, metadata.slots_T[rows].long(), new[rows])

    def paged_attention(
        self, q_THD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: TorchMetadata
    ) -> torch.Tensor:
        """See ``AttentionBackend``. Softmax in float32, for float64 in float64; scale ``D ** -0.5``.

        Exactly the ``context_len`` slots of each sequence are read. A query token whose own slot was -1 gets an
        unspecified result.
        """
        groups, mask, outputs = metadata.groups, metadata.mask, []
        num_tokens, width = q_THD.shape[0], q_THD.shape[2]
        if groups.pad is not None:
            q_THD = q_THD.index_select(1, groups.pad)
        # Tokens and the heads of a group become one axis, so that a sequence's K and V are read once per KV head.
        q_GTPD = q_THD.view(num_tokens, groups.num_kv, groups.size, width).transpose(0, 1)
        q_GMD = q_GTPD.reshape(groups.num_kv, num_tokens * groups.size, width)
        k_flat, v_flat = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        for span in metadata.spans:
            k_GLD, v_GLD = span.read(k_flat).transpose(0, 1), span.read(v_flat).transpose(0, 1)
            for start in range(span.start, span.stop, self._chunk):
                stop = min(start + self._chunk, span.stop)
                seen = span.context_len - (span.stop - stop)
                bias = None if stop - start == 1 else _corner(mask, (stop - start) * groups.size, seen)
                outputs.append(
                    F.scaled_dot_product_attention(
                        q_GMD[None, :, start * groups.size : stop * groups.size],
                        k_GLD[None, :, :seen],
                        v_GLD[None, :, :seen],
                        attn_mask=bias,
                    )
                )
        num_padding = num_tokens - (metadata.spans[-1].stop if metadata.spans else 0)
        if num_padding:
            shape = (1, groups.num_kv, num_padding * groups.size, width)
            outputs.append(torch.full(shape, math.nan, dtype=q_THD.dtype, device=q_THD.device))
        out_GMD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        out_GTPD = out_GMD.view(groups.num_kv, num_tokens, groups.size, width)
        out_THD = out_GTPD.transpose(0, 1).reshape(num_tokens, groups.num_kv * groups.size, width)
        return out_THD if groups.unpad is None else out_THD.index_select(1, groups.unpad)


def _spans(batch: ForwardBatch, block_size: int) -> tuple[SequenceSpan, ...]:
    tables = batch.block_tables_SB
    offsets = torch.arange(block_size, device=tables.device)
    slots_SL = (tables[:, :, None] * block_size + offsets).flatten(1)
    # Blocks 0, 1, ... of a table that follow each other in the cache can be read in place.
    broken = tables.diff(dim=1) != 1
    runs = torch.where(broken.any(1), broken.int().argmax(1) if broken.shape[1] else 0, broken.shape[1]) + 1
    spans = []
    bounds = pairwise(batch.query_start)
    facts = zip(bounds, batch.context_lens, slots_SL, tables[:, 0].tolist(), runs.tolist(), strict=True)
    for (start, stop), length, slots_L, first, run in facts:
        assert stop - start <= length <= len(slots_L), f"{stop - start} queries, context {length}, {len(slots_L)} slots"
        if length <= run * block_size:
            slots: slice | torch.Tensor = slice(first * block_size, first * block_size + length)
        else:
            slots = slots_L[:length]
        spans.append(SequenceSpan(start, stop, slots, length))
    return tuple(spans)


def _corner_mask(
    chunk: int, context_len: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    newest_seen = torch.arange(context_len - chunk, context_len, device=device).repeat_interleave(group_size)
    hidden = torch.arange(context_len, device=device) > newest_seen[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _corner(mask: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
    assert mask is not None
    corner = mask[mask.shape[0] - rows :, mask.shape[1] - columns :]
    # CUDA's fused attention reads the mask in wide words: a view that begins anywhere would be a misaligned address.
    return corner.contiguous() if corner.is_cuda else corner
