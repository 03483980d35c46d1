"""The largest pass that the settings allow, run once before the cache is sized, and what it takes on the device.

Knows a loaded model, its group, and how tokens are drawn; nothing of phases or requests. The contents are arbitrary:
sizes alone count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pearl_ray.core.comm import Group
from pearl_ray.core.errors import OutOfMemoryError
from pearl_ray.core.logits import Row, adjusted_logits
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.verify import Segment
from pearl_ray.kernels.sampler import Sampler, draws_of, judge_segments
from pearl_ray.model.batching import Entry
from pearl_ray.model.loading import LoadedModel, Role
from pearl_ray.model.runner import ModelRunner

Judge = Callable[[torch.Tensor, Sequence[int]], object]


@dataclass(frozen=True, kw_only=True)
class PassSize:
    """What bounds a pass.

    Attributes:
        max_tokens: query tokens, where the decoding rows alone aren't more.
        max_sequences: in one pass.
        rows_per_sequence: query tokens of one decoding sequence, each with logits: its window and one more.
        max_context: the longest sequence, in tokens.
    """

    max_tokens: int
    max_sequences: int
    rows_per_sequence: int
    max_context: int

    def shares(self) -> list[tuple[int, int]]:
        """``(query tokens, rows with logits)`` of each sequence of the largest pass.

        Decoding rows are never put off, so they may exceed ``max_tokens``; what they leave of it is prefilled.
        """
        rows = min(self.rows_per_sequence, self.max_context)
        left = max(self.max_tokens - self.max_sequences * rows, 0)
        each, more = divmod(left, self.max_sequences)
        extra = [each + (i < more) for i in range(self.max_sequences)]
        return [(min(rows + e, self.max_context), rows) for e in extra]


def entries_of(shares: Sequence[tuple[int, int]], max_context: int, block_size: int, num_blocks: int) -> list[Entry]:
    """A pass of these shares over few blocks: all sequences write to the same ones.

    The first one has the longest context, through a block table that goes round and round, as an attention backend's
    scratch memory may grow with it.
    """
    entries = []
    for index, (tokens, outputs) in enumerate(shares):
        start = max_context - tokens if index == 0 else 0
        table = [i % num_blocks for i in range(-(-(start + tokens) // block_size))]
        entries.append(Entry([0] * tokens, start, table, outputs))
    return entries


def heaviest_sampling(role: Role, sampler: Sampler) -> Judge:
    """What a round does with logits, where that takes most memory: with filters, for which the ranks gather them."""
    params = SamplingParams(temperature=1.0, top_p=0.9)

    def judge(logits_RV: torch.Tensor, counts: Sequence[int]) -> None:
        rows = [tuple(Row(params, index, 0, at) for at in range(count)) for index, count in enumerate(counts)]
        every = [row for some in rows for row in some]
        if role == "target":
            segments = [Segment(some, (0,) * (len(some) - 1)) for some in rows]
            judge_segments(sampler, adjusted_logits(logits_RV, every), segments)
        else:
            sampler.propose(logits_RV, draws_of(every, logits_RV.device, draft=True))

    return judge


@torch.inference_mode()
def warm_up(
    model: LoadedModel, group: Group, pass_size: PassSize, *, block_size: int, num_valid: int, judge: Judge
) -> int:
    """Run the largest pass; returns the bytes it took on a GPU beyond what stays (0 elsewhere). Collective.

    Args:
        judge: given the logits ``[R, V_local]`` and how many rows each sequence has, does what a round does with them.

    Raises:
        OutOfMemoryError: the pass doesn't fit; says which settings make it smaller.
    """
    shares = pass_size.shares()
    num_blocks = -(-max(tokens for tokens, _ in shares) // block_size) + 1
    entries = entries_of(shares, pass_size.max_context, block_size, num_blocks)
    on_gpu = model.device.type == "cuda"
    before = 0
    try:
        cache = model.make_cache(num_blocks, block_size)
        runner = ModelRunner(model.transformer, cache, group, block_size=block_size, num_valid=num_valid)
        if on_gpu:
            before = _settled(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
        logits_RV = runner.logits(entries)
        assert logits_RV is not None
        judge(logits_RV, [outputs for _, outputs in shares])
    except torch.OutOfMemoryError as error:
        tokens, rows = (sum(share[i] for share in shares) for i in range(2))
        raise OutOfMemoryError(
            f"a pass of {tokens} tokens, {rows} of them with logits, doesn't fit beside the weights on {model.device}; "
            "lower --max-num-seqs, --max-num-batched-tokens or --num-speculative-tokens, or use more GPUs"
        ) from error
    if not on_gpu:
        return 0
    torch.cuda.synchronize(model.device)
    # Reserved, not allocated: what the allocator took from the driver, its fragments included.
    return max(torch.cuda.max_memory_reserved(model.device) - before, 0)


def used_and_total(device: torch.device) -> tuple[int, int]:
    """``(used, total)`` bytes of a GPU as its driver says, all processes and NCCL included, between passes."""
    _settled(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free), int(total)


def _settled(device: torch.device) -> int:
    """Bytes reserved by torch once all that is free in its pools is given back."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_reserved(device))
