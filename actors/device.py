"""What a shard's rounds need on a GPU: passes of fixed shape, samplers, CUDA graphs, and the measured costs of steps.

Puts together what ``model`` and ``kernels`` offer; the shard asks for it once, when its cache exists. Knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pearl_ray.core.comm import Group
from pearl_ray.core.messages import MAX_PROPOSALS
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.sampling import Row
from pearl_ray.core.verify import Segment
from pearl_ray.core.windows import MAX_WINDOW
from pearl_ray.kernels.sampler import Sampler, judge_segments, make_sampler
from pearl_ray.model.batching import Entry
from pearl_ray.model.draft_steps import DraftSteps, Writer
from pearl_ray.model.graphs import GraphPool
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.passes import QUERY_BUCKETS, ROW_BUCKETS, SEQUENCE_BUCKETS, PassRunner, Shape, padded
from pearl_ray.model.transformer import Transformer
from pearl_ray.model.verification import Verification

GRAPH_SECONDS = 60.0  # for capturing; what is left over then runs without a graph
GRAPH_BYTES = 1 << 30
TARGET_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAFT_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
MOST_DRAFTED = 64  # tokens of a window, at most: a request may ask for more than the engine would
REPEATS = 5
PROFILE_STEPS = 5


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """One rank's: ``steps`` is the draft's, ``verification`` the target's."""

    runner: PassRunner
    sampler: Sampler
    steps: DraftSteps | None = None
    verification: Verification | None = None


def make_parts(
    role: str,
    model: Transformer,
    cache: KVCache,
    group: Group,
    *,
    block_size: int,
    num_valid: int,
    max_num_seqs: int,
    max_model_len: int,
    max_window: int,
    use_graphs: bool,
) -> DeviceParts:
    """The parts of one rank; ``use_graphs``: where the device, its group and the attention backend can be captured."""
    runner = PassRunner(
        model,
        cache,
        group,
        block_size=block_size,
        num_valid=num_valid,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        graphs=GraphPool(
            model.device,
            enabled=use_graphs,
            budget_s=GRAPH_SECONDS,
            budget_bytes=GRAPH_BYTES,
            agree=lambda own: _leaders(own, group, model.device),
        ),
    )
    sampler = make_sampler(model.device, group, model.vocab_sizes, num_valid)
    if role == "draft":
        return DeviceParts(runner, sampler, steps=DraftSteps(runner, sampler, max_window))
    return DeviceParts(runner, sampler, verification=Verification(runner, sampler, max_window))


def _leaders(answer: bool, group: Group, device: torch.device) -> bool:
    """Rank 0's answer, on every rank: a rank alone in a pass would wait for the others. Collective."""
    if group.size == 1:
        return answer
    return bool(group.broadcast_(torch.tensor([int(answer)], device=device)).item())


def can_capture(group: Group, attention_backend: str, *, enforce_eager: bool) -> bool:
    """Whether passes of this rank can be CUDA graphs: nothing in them may go through the host."""
    by_device = group.size == 1 or getattr(group, "backend", None) == "nccl"
    return by_device and attention_backend != "torch" and not enforce_eager


@torch.inference_mode()
def capture(role: str, parts: DeviceParts, max_width: int, max_tokens: int, *, deterministic: bool = False) -> None:
    """Compile the kernels and make the graphs that rounds will ask for. Collective; the cache must be unused yet.

    Args:
        max_width: rows of a decoding sequence's pass.
        max_tokens: of a pass; those with prompts among them come last, which have the most to compute by launch.
        deterministic: they have none, for attention's fixed plan takes its time by the sequences it is padded to.
    """
    runner = parts.runner
    is_cuda = runner.device.type == "cuda"  # else nothing is compiled
    if is_cuda:
        runner.warm_up()
    if role == "target":
        assert parts.verification is not None
        if is_cuda:
            parts.verification.warm_up(max_width)
            warm_up_rejection(parts, max_width)
        runner.capture(verification_shapes(runner, max_width))
        runner.capture(runner.shape(rows, 1, rows) for rows in TARGET_ROWS if rows <= runner.max_rows)  # ``profile``
    else:
        assert parts.steps is not None
        if is_cuda:
            parts.steps.warm_up()
        parts.steps.capture(size for size in SEQUENCE_BUCKETS if size <= padded(runner.max_seqs, SEQUENCE_BUCKETS))
        runner.capture(verification_shapes(runner, 2))  # a round's first pass: one row each, two after a bonus token
    if not deterministic:
        runner.capture(runner.wide_shapes(max_tokens))
    runner.graphs.log(role)


def warm_up_rejection(parts: DeviceParts, max_width: int) -> None:
    """Judge a window by the rejection rule once in float32, as rounds do that take the host, to compile kernels.

    Without filters, with one, and with those that take a second search. Collective.
    """
    width = min(max(max_width, 2), parts.runner.max_rows)
    logits_RV = parts.runner.logits_RV[:width].float()
    for fields in ({}, {"top_p": 0.5}, {"top_p": 0.5, "top_k": 5}):
        row = Row(SamplingParams(temperature=1.0, **fields), 0, 0, 1)
        ids = np.zeros((width - 1, MAX_PROPOSALS), np.int32)
        segment = Segment((row,) * width, (0,) * (width - 1), True, ids, np.zeros(ids.shape, np.float32))
        judge_segments(parts.sampler, logits_RV, [segment])
    parts.runner.wait()


def verification_shapes(runner: PassRunner, max_width: int) -> Iterator[Shape]:
    """The shapes of decoding passes: every number of sequences, rows for windows up to ``max_width``."""
    fewest = 1
    for seqs in SEQUENCE_BUCKETS:
        if fewest > runner.max_seqs:
            return
        most = min(seqs, runner.max_seqs)
        low, high = padded(fewest, ROW_BUCKETS), padded(min(most * max_width, runner.max_rows), ROW_BUCKETS)
        for rows in (size for size in ROW_BUCKETS if low <= size <= high):
            longest = min(max_width, rows - fewest + 1)
            shortest = -(-(_below(rows) + 1) // most)
            for query in QUERY_BUCKETS:
                if padded(shortest, QUERY_BUCKETS) <= query <= padded(longest, QUERY_BUCKETS):
                    yield Shape(rows, seqs, min(query, rows))
        fewest = seqs + 1


def _below(rows: int) -> int:
    """The bucket before this one."""
    at = ROW_BUCKETS.index(rows)
    return ROW_BUCKETS[at - 1] if at else 0


@torch.inference_mode()
def profile(role: str, parts: DeviceParts, num_blocks: int, context: int) -> dict[int, float]:
    """Measured seconds: a target pass by its rows, a draft step by its sequences. Collective; before any request.

    Behind :func:`capture`, for rounds run as graphs.
    """
    return (
        _profile_target(parts, num_blocks, context) if role == "target" else _profile_draft(parts, num_blocks, context)
    )


def _profile_target(parts: DeviceParts, num_blocks: int, context: int) -> dict[int, float]:
    runner = parts.runner
    blocks, start, room = _place(runner, num_blocks, context, TARGET_ROWS[-1])
    seconds = {}
    for rows in TARGET_ROWS:
        if rows > min(room, runner.max_rows):
            break
        entries = [Entry([0] * rows, start, blocks, rows)]
        seconds[rows] = _fastest(runner, lambda entries=entries: runner.logits(entries))
    return seconds


def _profile_draft(parts: DeviceParts, num_blocks: int, context: int) -> dict[int, float]:
    """A step's seconds, with its sampling: of a window of several less a window of one."""
    runner, steps = parts.runner, parts.steps
    assert steps is not None
    blocks, start, room = _place(runner, num_blocks, context, MAX_WINDOW)
    seconds = {}
    for count in DRAFT_SEQUENCES:
        if count > runner.max_seqs or room < PROFILE_STEPS:
            break
        first = [Entry([0], start, blocks, 1)] * count
        row = Row(SamplingParams(temperature=0.0), 0, 0, start + 1)

        def window(limit: int, first: list[Entry] = first, row: Row = row) -> None:
            steps.write(first, [Writer(-1, blocks, row, limit, False)] * len(first))

        one, several = (_fastest(runner, lambda limit=limit: window(limit)) for limit in (1, PROFILE_STEPS))
        seconds[count] = max((several - one) / (PROFILE_STEPS - 1), 1e-6)
    return seconds


def _place(runner: PassRunner, num_blocks: int, context: int, wanted: int) -> tuple[list[int], int, int]:
    """Blocks, the first position to measure at behind ``context`` tokens or what there is, and the room from there."""
    size = runner.block_size
    most = min(num_blocks, runner.max_context // size)  # beyond that no table reaches
    blocks = list(range(min(most, -(-(context + wanted) // size))))
    start = min(context, len(blocks) * size // 2)
    return blocks, start, len(blocks) * size - start


def _fastest(runner: PassRunner, function: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        function()
        runner.wait()
        times.append(time.monotonic() - began)
    return min(times)
