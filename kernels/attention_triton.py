"""The attention backend 'triton': metadata on the device, scratch memory, launches. Knows no layers.

Shapes: T query tokens, S sequences, H query heads, G KV heads, D head width, B blocks of a table. What changes from
round to round is a device tensor, so that a forward can be captured in a CUDA graph with maxima fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.errors import ConfigError
from pearl_ray.kernels.attention_join import cut, join
from pearl_ray.kernels.attention_kernel import attend
from pearl_ray.kernels.attention_plan import (
    FIXED_ROWS,
    MAX_TILE,
    Plan,
    TritonMetadata,
    cut_up,
    make_fixed_plan,
    make_plan,
    scratch_tiles,
    slices,
)
from pearl_ray.kernels.kv_store import store_kv
from pearl_ray.kernels.overlap import OVERLAPPED

__all__ = ["DTYPES", "HEAD_DIMS", "Plan", "TritonAttention", "TritonMetadata", "make_plan", "num_multiprocessors"]

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
JOIN_LAST_BYTES = 512 * 1024  # partial results that one program may join by itself; more are joined in parallel


class TritonAttention:
    """The backend named 'triton' (see ``AttentionBackend``). For one stream: forwards share scratch memory.

    Deterministic: every launch has a fixed plan, and long chunks are cut up, which bounds the scratch memory.
    """

    name = "triton"

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        self._head_starts: dict[tuple[tuple[int, ...], torch.device], tuple[torch.Tensor, int]] = {}
        self._scratch: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._retired: list[torch.Tensor] = []

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
        device = batch.token_ids_T.device
        head_start, group_size = self._checked_heads(q_to_kv, dtype, device)
        starts, lengths, tables = list(batch.query_start), list(batch.context_lens), batch.block_tables_SB
        if self._deterministic:
            starts, lengths, owners = cut_up(starts, lengths, max(FIXED_ROWS // group_size, 1))
            if len(owners) > len(tables):
                tables = tables.index_select(0, _on_device(owners, torch.int64, device))
        fill = [0] * (-len(starts) % 4)  # Triton compiles anew for addresses that aren't multiples of 16 bytes
        facts = _on_device((*starts, *fill, *lengths), torch.int32, device)
        return TritonMetadata(
            facts[: len(starts)],
            facts[len(starts) + len(fill) :],
            tables,
            batch.slots_T,
            head_start,
            group_size,
            max(b - a for a, b in pairwise(starts)),
            max(lengths),
            block_size,
        )

    def prepare_static(
        self, batch: StaticBatch, *, block_size: int, q_to_kv: Sequence[int], dtype: torch.dtype
    ) -> TritonMetadata:
        """See ``AttentionBackend``.

        Contexts far below the maximum cost programs that end at once: the number of parts that a sequence's keys are
        cut into follows its length, on the device.

        Raises:
            ConfigError: ``dtype`` isn't bfloat16 or float16.
        """
        return TritonMetadata(
            batch.query_start_S1,
            batch.context_lens_S,
            batch.block_tables_SB,
            batch.slots_T,
            *self._checked_heads(q_to_kv, dtype, batch.token_ids_T.device),
            batch.max_query_len,
            batch.max_context_len,
            block_size,
        )

    def _checked_heads(
        self, q_to_kv: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, int]:
        if dtype not in DTYPES:
            raise ConfigError("attention_backend", "triton", f"it takes bfloat16 and float16, not {dtype}; use 'torch'")
        return self.heads(q_to_kv, device)

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
        if not self._deterministic or plan is not None:
            plan = plan or make_plan(metadata, num_kv, head_dim, num_multiprocessors(q_THD.device))
            self._launch(out_THD, q_THD, k_cache, v_cache, metadata, plan, self._scratch_for(q_THD.device))
            return out_THD
        plan = make_fixed_plan(metadata, head_dim)
        rows_of_sequence = num_kv * plan.parts // len(metadata.context_lens_S) * plan.rows
        scratch = self._scratch_for(q_THD.device, rows_of_sequence * triton.next_power_of_2(head_dim))
        fitting = min(len(scratch[0]) // triton.next_power_of_2(head_dim), len(scratch[1])) // rows_of_sequence
        for some in slices(metadata, fitting):
            self._launch(out_THD, q_THD, k_cache, v_cache, some, plan, scratch)
        return out_THD

    def _launch(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: TritonMetadata,
        plan: Plan,
        scratch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        num_kv, head_dim = k_cache.shape[2], q_THD.shape[2]
        num_seqs, dim = len(metadata.context_lens_S), triton.next_power_of_2(head_dim)
        partial, partial_top, counters = scratch
        assert plan.rows <= 128 and plan.rows * dim <= MAX_TILE
        num_units, num_slots = plan.most_units(metadata), plan.most_slots(metadata)
        assert num_slots * num_kv * plan.rows <= min(len(partial) // dim, len(partial_top))
        part_bytes = plan.rows * dim * 4 * triton.cdiv(plan.parts, plan.most_tiles(metadata))
        is_joined_last = not plan.is_fixed and plan.rows < 128 and part_bytes <= JOIN_LAST_BYTES
        assert not is_joined_last or num_slots * num_kv <= len(counters)
        has_masks, has_units = metadata.masks_T is not None, num_seqs > 1 or plan.tiles > 1
        shape = {"HEAD_DIM": head_dim, "DIM": dim, "GROUP": metadata.group_size, "ROWS": plan.rows, "BLOCK": plan.block}
        shape |= {"HAS_MASKS": has_masks, "HAS_UNITS": has_units}
        least = max(1, plan.min_keys // plan.block)
        alone = triton.cdiv(plan.alone_keys, plan.block)
        units = self._units(metadata, plan, num_units, least, alone) if has_units else counters
        attend[(num_kv, num_units)](
            q_THD,
            k_cache,
            v_cache,
            out_THD,
            metadata.block_tables_SB,
            units,
            metadata.query_start_S1,
            metadata.context_lens_S,
            metadata.head_start_G1,
            metadata.masks_T if has_masks else counters,
            metadata.window_starts_S if has_masks else counters,
            partial,
            partial_top,
            counters,
            head_dim**-0.5 * 1.4426950408889634,
            num_kv,
            plan.parts,
            least,
            alone,
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
            ONE_LOOP=plan.has_one_loop,
            LATE_SUM=plan.rows == 16,
            STAGES=plan.stages,
            num_warps=plan.warps,
            **OVERLAPPED,
            enable_fp_fusion=not plan.is_fixed,  # else masked and unmasked blocks round differently
        )
        if num_slots and not is_joined_last:
            some = 8 if plan.rows == 128 else 4
            join[(plan.rows // some, num_kv, num_units)](
                out_THD,
                units,
                metadata.query_start_S1,
                metadata.context_lens_S,
                metadata.head_start_G1,
                partial,
                partial_top,
                plan.parts,
                num_kv,
                least,
                alone,
                out_THD.stride(0),
                out_THD.stride(1),
                **shape,
                SOME=some,
                num_warps=2,
                **OVERLAPPED,
                enable_fp_fusion=not plan.is_fixed,
            )

    def _units(self, metadata: TritonMetadata, plan: Plan, num_units: int, least: int, alone: int) -> torch.Tensor:
        """How the pass is cut, by the kernel ``cut``: once for all its layers."""
        if plan not in metadata.cuts:
            some, tokens = 64, plan.rows // metadata.group_size
            units = torch.empty((1 + num_units, 8), dtype=torch.int32, device=metadata.query_start_S1.device)
            cut[(triton.cdiv(num_units, some),)](
                units,
                metadata.query_start_S1,
                metadata.context_lens_S,
                len(metadata.context_lens_S),
                plan.parts,
                least,
                alone,
                num_units,
                TOKENS=tokens,
                BLOCK=plan.block,
                SOME=some,
                **OVERLAPPED,
            )
            metadata.cuts[plan] = units
        return metadata.cuts[plan]

    def _scratch_for(self, device: torch.device, least: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Partial results, their log-sum-exps, and the counters (zero between launches), made once for all forwards.

        ``least``: partial results to have room for; more memory is taken than the first time only where one sequence's
        don't fit, and the old is kept for the graphs that use it.
        """
        if device not in self._scratch or len(self._scratch[device][0]) < least:
            tiles = (4 if self._deterministic else 1) * scratch_tiles(num_multiprocessors(device))
            tiles = max(tiles, triton.cdiv(least, MAX_TILE))
            self._retired.extend(self._scratch.pop(device, ()))
            self._scratch[device] = (
                torch.empty((tiles * MAX_TILE,), dtype=torch.float32, device=device),
                torch.empty((tiles * MAX_TILE // HEAD_DIMS[0],), dtype=torch.float32, device=device),
                torch.zeros((tiles * MAX_TILE // HEAD_DIMS[0] // 16,), dtype=torch.int32, device=device),
            )
        return self._scratch[device]


def _on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    facts = torch.tensor(values, dtype=dtype)
    return facts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else facts.to(device)


def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; a few for the interpreter, so that it splits too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
