"""Which of the ways to compute a linear map is fastest here, measured as a model launches it. Knows shapes, no layers.

A way is timed in a CUDA graph, after a norm and before the next one, over several weights of the same shape: so the
weights come from memory, and what a kernel gains by beginning early, or loses, counts. A map to gates and ups is timed
with SiLU·mul behind it, by itself or within, and is another map than a plain one of its shape. A way that doesn't
compute what the library does, on a device or with a compiler that nobody has tried, is not taken.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import triton

from pearl_ray.kernels.capture import captured
from pearl_ray.kernels.linear import MAX_ROWS, TORCH, Choice, Scratch, candidates, gate_up_silu, linear
from pearl_ray.kernels.norm import rms_norm

logger = logging.getLogger(__name__)

COLD_BYTES = 256 << 20  # of the weights that are timed in turn, where a model has so many: several times the L2 cache
MOST_WEIGHTS = 32
FEWEST_MAPS = 4  # of one measurement
REPEATS = 5
FINALISTS = 4
FINAL_ROUNDS = 9
MOST_ERROR = 0.02  # of a result, relative to the library's; two roundings to bfloat16 differ by 0.003


@dataclass(slots=True)
class LinearChoices:
    """The fastest way for each (outputs, inputs, type, is it to gates and ups, rows up to a power of two).

    Settle every shape before a forward is captured. Numerics differ between the ways by rounding, so ranks and
    replicas that must agree bit for bit share one object's answers (``chosen`` can be copied).
    """

    chosen: dict[tuple[int, int, torch.dtype, bool, int], Choice] = field(default_factory=dict)
    scratch: Scratch | None = None

    def settle(self, weights: Sequence[torch.Tensor], num_rows: int, gate_ups: Sequence[torch.Tensor] = ()) -> None:
        """Measures each shape among the weights for every number of rows up to ``num_rows``; compiles: seconds.

        ``gate_ups``: weights of maps to gates and ups, which ``weights`` are not.
        """
        of_shape: dict[tuple[torch.Size, torch.dtype, bool], list[torch.Tensor]] = {}
        for some, is_gate_up in ((weights, False), (gate_ups, True)):
            for weight_NK in some:
                if weight_NK.device.type == "cuda":
                    of_shape.setdefault((weight_NK.shape, weight_NK.dtype, is_gate_up), []).append(weight_NK)
        for (_, _, is_gate_up), same in of_shape.items():
            if self.scratch is None:
                self.scratch = Scratch(same[0].device)
            bucket = 1
            while bucket <= min(MAX_ROWS, triton.next_power_of_2(max(num_rows, 1))):
                key = _key(same[0], bucket, is_gate_up)
                if key not in self.chosen:
                    ways = candidates(bucket, *same[0].shape, is_gate_up=is_gate_up)
                    self.chosen[key] = fastest(same, bucket, ways, self.scratch, is_gate_up=is_gate_up)
                bucket *= 2
        if of_shape:
            torch.cuda.empty_cache()  # what the graphs took

    def settled(self, weight_NK: torch.Tensor, num_rows: int, *, is_gate_up: bool = False) -> Choice:
        """The choice that was measured; the library where none was. Never measures."""
        if not 0 < num_rows <= MAX_ROWS:
            return TORCH
        bucket = 1 << (num_rows - 1).bit_length()
        return self.chosen.get(_key(weight_NK, bucket, is_gate_up), TORCH)


def _key(weight_NK: torch.Tensor, bucket: int, is_gate_up: bool) -> tuple[int, int, torch.dtype, bool, int]:
    num_out, num_in = weight_NK.shape
    return num_out, num_in, weight_NK.dtype, is_gate_up, bucket


def fastest(
    weights: Sequence[torch.Tensor],
    num_rows: int,
    ways: Iterable[Choice],
    scratch: Scratch | None = None,
    *,
    is_gate_up: bool = False,
) -> Choice:
    """The fastest of the ways; see :func:`milliseconds`.

    The best of a first look are timed again in turn, many times: among so many ways the one that was lucky would win,
    and the others' times were taken while the device's clocks were at something else.
    """
    first = {c: milliseconds(weights, num_rows, c, scratch, is_gate_up=is_gate_up) for c in ways}
    best = sorted(first, key=first.__getitem__)[:FINALISTS]
    chains = [Chain(weights, num_rows, choice, scratch, is_gate_up) for choice in best if first[choice] < math.inf]
    if len(chains) < 2:
        return best[0]
    times = [[chain.seconds(1)[0] for chain in chains] for _ in range(FINAL_ROUNDS)]
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    return chains[middle.index(min(middle))].choice


def milliseconds(
    weights: Sequence[torch.Tensor],
    num_rows: int,
    choice: Choice,
    scratch: Scratch | None = None,
    *,
    is_gate_up: bool = False,
) -> float:
    """Time of one map with its norm, the best of a few runs over the weights; infinite where it can't be taken.

    Args:
        weights: on one CUDA device, of one shape ``[N, K]``.
        is_gate_up: to gates and ups; the time of SiLU·mul counts.
    """
    try:
        chain = Chain(weights, num_rows, choice, scratch, is_gate_up)
    except triton.runtime.errors.OutOfResources:
        return math.inf
    if not chain.error <= MOST_ERROR:
        logger.warning("%s is not taken: it errs by %.3g for %s", choice, chain.error, tuple(weights[0].shape))
        return math.inf
    return 1e3 * min(chain.seconds(REPEATS))


class Chain:
    """A CUDA graph of several maps, each with a norm before it, computed in one way.

    Attributes:
        error: of the result, relative to the library's.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], num_rows: int, choice: Choice, scratch: Scratch | None, is_gate_up: bool
    ) -> None:
        """Compiles. Raises ``OutOfResources`` where the way doesn't fit the device."""
        self.choice = choice
        mapped = gate_up_silu if is_gate_up else linear
        first = weights[0]
        wanted = min(max(1, -(-COLD_BYTES // first.nbytes)), MOST_WEIGHTS, len(weights))
        some = list(weights[:wanted])
        some *= -(-FEWEST_MAPS // len(some))
        x_MK = torch.randn((num_rows, first.shape[1]), dtype=first.dtype, device=first.device)
        gain_K = torch.ones(first.shape[1], dtype=first.dtype, device=first.device)

        def one(weight_NK: torch.Tensor, way: Choice = choice) -> torch.Tensor:
            return mapped(rms_norm(x_MK, gain_K, 1e-6), weight_NK, None, way, scratch)

        def chain() -> None:
            for weight_NK in some:
                one(weight_NK)

        self._count = len(some)
        self._kept = x_MK, gain_K, some  # what the graph reads
        self._stream = torch.cuda.Stream(first.device)
        self._stream.wait_stream(torch.cuda.current_stream(first.device))
        with torch.cuda.stream(self._stream):
            out, expected = one(first).float(), one(first, TORCH).float()
            self.error = float((out - expected).norm() / expected.norm().clamp(min=1e-30))
            self._graph = captured(chain)

    def seconds(self, runs: int) -> list[float]:
        """Of one map with its norm, in each of so many runs, queued one behind the other and behind another; waits."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        with torch.cuda.stream(self._stream):
            for event in events:
                self._graph.replay()
                event.record(self._stream)
        events[-1].synchronize()
        return [before.elapsed_time(event) / 1e3 / self._count for before, event in pairwise(events)]
