"""The attention backend 'triton': metadata on the device, tile sizes, splits over the keys. Knows no layers.

Shapes: T query tokens, S sequences, H query heads, G KV heads, D head width, B blocks of a table. What changes from
round to round is a device tensor, so that a forward can be captured in a CUDA graph with maxima fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton

from pearl_ray.core.batch import ForwardBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels.attention_kernel import attend, join
from pearl_ray.kernels.kv_store import store_kv

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
MIN_SPLIT_KEYS = 128  # a part of the keys is at least this long
MAX_TILE = 128 * 128  # rows x width of a tile of query rows
JOIN_LAST_BYTES = 512 * 1024  # partial results that one program may join by itself; more are joined in parallel


@dataclass(frozen=True, slots=True)
class TritonMetadata:
    """What the layers of one forward share.

    Attributes:
        query_start_S1, context_lens_S: int32 on the device; a sequence without query tokens is skipped, so batches of
            fewer sequences fit the same graph. Rows from the last ``query_start`` on keep whatever the output held.
        block_tables_SB: int32 or int64; entries behind a sequence's keys aren't read.
        slots_T: int64, -1 writes nothing.
        head_start_G1: int32, first query head of each KV head, and H.
        group_size: query heads of the widest group.
        max_query_len, max_context_len: bounds over the sequences, fixed where the forward is captured.
        block_size: of the cache.
        masks_T: int64, bit j: the row sees key ``window_starts[s] + j``; it sees every key before that. None: causal.
        window_starts_S: int32.
    """

    query_start_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    slots_T: torch.Tensor
    head_start_G1: torch.Tensor
    group_size: int
    max_query_len: int
    max_context_len: int
    block_size: int
    masks_T: torch.Tensor | None = None
    window_starts_S: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The launch: rows of a tile, keys of a block, tiles per sequence, parts of the keys, warps, pipeline stages."""

    rows: int
    block: int
    tiles: int
    splits: int
    warps: int
    stages: int


def make_plan(metadata: TritonMetadata, num_kv: int, head_dim: int, num_sms: int) -> Plan:
    """As few tiles as hold the query rows, and enough parts to give every multiprocessor two programs."""
    dim = triton.next_power_of_2(head_dim)
    most = min(128, MAX_TILE // dim)
    least = max(16, triton.next_power_of_2(metadata.group_size))
    rows = max(least, min(most, triton.next_power_of_2(metadata.max_query_len * metadata.group_size)))
    tiles = triton.cdiv(metadata.max_query_len, rows // metadata.group_size)
    block = 32 if dim == 256 else 64 if dim == 128 else 128
    programs = tiles * num_kv * len(metadata.context_lens_S)
    # A few parts that are long leave less to join; where a launch has many programs anyway, two run at a time.
    per_sm = 1 if programs * 8 <= num_sms else 2
    if (per_sm == 1 or metadata.max_context_len <= 1024) and rows <= 32 and dim < 256:
        block = 128
    splits = max(1, min(per_sm * num_sms // programs, triton.cdiv(metadata.max_context_len, MIN_SPLIT_KEYS)))
    return Plan(rows, block, tiles, splits, 8 if rows >= 128 else 4, 2 if block == 128 and dim == 128 else 3)


class TritonAttention:
    """The backend named 'triton' (see ``AttentionBackend``). For one stream: forwards share scratch memory."""

    name = "triton"

    def __init__(self) -> None:
        self._head_starts: dict[tuple[tuple[int, ...], torch.device], tuple[torch.Tensor, int]] = {}
        self._scratch: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def heads(self, q_to_kv: Sequence[int], device: torch.device) -> tuple[torch.Tensor, int]:
        """``(head_start_G1, group_size)``; ``q_to_kv`` must not decrease and must name every KV head."""
        key = (tuple(q_to_kv), device)
        if key not in self._head_starts:
            counts = [0] * (q_to_kv[-1] + 1)
            for kv in q_to_kv:
                counts[kv] += 1
            assert list(q_to_kv) == sorted(q_to_kv) and all(counts), f"{q_to_kv=} isn't grouped"
            starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
            self._head_starts[key] = (torch.tensor(starts, dtype=torch.int32, device=device), max(counts))
        return self._head_starts[key]

    def prepare(
        self, batch: ForwardBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> TritonMetadata:
        """See ``AttentionBackend``. One small copy to the device, no wait.

        Raises:
            ConfigError: ``dtype`` isn't bfloat16 or float16.
        """
        if dtype not in DTYPES:
            raise ConfigError("attention_backend", "triton", f"it takes bfloat16 and float16, not {dtype}; use 'torch'")
        device = batch.token_ids_T.device
        head_start, group_size = self.heads(q_to_kv, device)
        facts = torch.tensor((*batch.query_start, *batch.context_lens), dtype=torch.int32)
        if device.type == "cuda":
            facts = facts.pin_memory().to(device, non_blocking=True)
        num_seqs = len(batch.context_lens)
        return TritonMetadata(
            facts[: num_seqs + 1],
            facts[num_seqs + 1 :],
            batch.block_tables_SB,
            batch.slots_T,
            head_start,
            group_size,
            max(b - a for a, b in pairwise(batch.query_start)),
            max(batch.context_lens),
            block_size,
        )

    def store_kv(
        self,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: TritonMetadata,
    ) -> None:
        """See ``AttentionBackend``."""
        store_kv(k_TGD, v_TGD, k_cache, v_cache, metadata.slots_T)

    def paged_attention(
        self, q_THD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: TritonMetadata
    ) -> torch.Tensor:
        """See ``AttentionBackend``. Softmax in float32; scale ``D ** -0.5``."""
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        return self.paged_attention_into(out, q_THD, k_cache, v_cache, metadata)

    def paged_attention_into(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: TritonMetadata,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """:meth:`paged_attention` into a given tensor. Run once before a graph is captured: scratch is made then."""
        num_kv, head_dim = k_cache.shape[2], q_THD.shape[2]
        assert q_THD.stride(2) == 1 and out_THD.stride(2) == 1 and k_cache.stride() == v_cache.stride()
        assert k_cache.stride(3) == 1 and k_cache.shape[1] == metadata.block_size
        if head_dim not in HEAD_DIMS:
            raise ConfigError(
                "attention_backend", "triton", f"head widths are {HEAD_DIMS}, not {head_dim}; use 'torch'"
            )
        plan = plan or make_plan(metadata, num_kv, head_dim, num_multiprocessors(q_THD.device))
        num_seqs, dim = len(metadata.context_lens_S), triton.next_power_of_2(head_dim)
        partial, partial_top, counters = self._scratch_for(q_THD.device)
        assert plan.splits == 1 or num_seqs * plan.tiles * num_kv * plan.splits <= len(counters)
        assert plan.rows <= 128 and plan.rows * dim <= MAX_TILE
        is_joined_last = plan.splits * plan.rows * dim * 4 <= JOIN_LAST_BYTES
        has_masks = metadata.masks_T is not None
        shape = {"HEAD_DIM": head_dim, "DIM": dim, "GROUP": metadata.group_size, "ROWS": plan.rows, "BLOCK": plan.block}
        shape |= {"MIN_BLOCKS": max(1, MIN_SPLIT_KEYS // plan.block), "HAS_MASKS": has_masks}
        attend[(plan.tiles, num_kv * plan.splits, num_seqs)](
            q_THD,
            k_cache,
            v_cache,
            out_THD,
            metadata.block_tables_SB,
            metadata.query_start_S1,
            metadata.context_lens_S,
            metadata.head_start_G1,
            metadata.masks_T if has_masks else counters,
            metadata.window_starts_S if has_masks else counters,
            partial,
            partial_top,
            counters,
            head_dim**-0.5 * 1.4426950408889634,
            plan.splits,
            q_THD.stride(0),
            q_THD.stride(1),
            out_THD.stride(0),
            out_THD.stride(1),
            k_cache.stride(0),
            k_cache.stride(1),
            k_cache.stride(2),
            metadata.block_tables_SB.stride(0),
            **shape,
            PAGE=metadata.block_size,
            JOIN_LAST=is_joined_last,
            STAGES=plan.stages,
            num_warps=plan.warps,
        )
        if plan.splits > 1 and not is_joined_last:
            some = 4
            join[(plan.tiles * (plan.rows // some), num_kv, num_seqs)](
                out_THD,
                metadata.query_start_S1,
                metadata.context_lens_S,
                metadata.head_start_G1,
                partial,
                partial_top,
                plan.splits,
                num_kv,
                out_THD.stride(0),
                out_THD.stride(1),
                **shape,
                SOME=some,
                num_warps=2,
            )
        return out_THD

    def _scratch_for(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Partial results, their log-sum-exps, and the counters (zero between launches), made once for all forwards."""
        if device not in self._scratch:
            programs = 2 * num_multiprocessors(device)
            self._scratch[device] = (
                torch.empty((programs * MAX_TILE,), dtype=torch.float32, device=device),
                torch.empty((programs * 128,), dtype=torch.float32, device=device),
                torch.zeros((programs,), dtype=torch.int32, device=device),
            )
        return self._scratch[device]


def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; a few for the interpreter, so that it splits too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
