"""Which of the ways to compute a linear map is fastest here, measured as a model launches it. Knows shapes, no layers.

A way is timed in a CUDA graph, after a norm and before the next one, over several weights of the same shape: so the
weights come from memory, and what a kernel gains by beginning early, or loses, counts. A way that doesn't compute what
the library does, on a device or with a compiler that nobody has tried, is not taken.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton

from pearl_ray.kernels.capture import captured
from pearl_ray.kernels.linear import MAX_ROWS, TORCH, Choice, Scratch, candidates, linear
from pearl_ray.kernels.norm import rms_norm

logger = logging.getLogger(__name__)

COLD_BYTES = 256 << 20  # of the weights that are timed in turn, where a model has so many: several times the L2 cache
MOST_WEIGHTS = 32
FEWEST_MAPS = 4  # of one measurement
REPEATS = 5
MOST_ERROR = 0.02  # of a result, relative to the library's; two roundings to bfloat16 differ by 0.003


@dataclass(slots=True)
class LinearChoices:
    """The fastest way for each (outputs, inputs, type, rows up to a power of two).

    Settle every shape before a forward is captured. Numerics differ between the ways by rounding, so ranks and
    replicas that must agree bit for bit share one object's answers (``chosen`` can be copied).
    """

    chosen: dict[tuple[int, int, torch.dtype, int], Choice] = field(default_factory=dict)
    scratch: Scratch | None = None

    def settle(self, weights: Sequence[torch.Tensor], num_rows: int) -> None:
        """Measures each shape among the weights for every number of rows up to ``num_rows``; compiles: seconds."""
        of_shape: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        for weight_NK in weights:
            if weight_NK.device.type == "cuda":
                of_shape.setdefault((weight_NK.shape, weight_NK.dtype), []).append(weight_NK)
        if of_shape and self.scratch is None:
            self.scratch = Scratch(weights[0].device)
        for same in of_shape.values():
            bucket = 1
            while bucket <= min(MAX_ROWS, triton.next_power_of_2(max(num_rows, 1))):
                key = (*same[0].shape, same[0].dtype, bucket)
                if key not in self.chosen:
                    ways = candidates(bucket, *same[0].shape)
                    times = {choice: milliseconds(same, bucket, choice, self.scratch) for choice in ways}
                    self.chosen[key] = min(times, key=times.__getitem__)
                bucket *= 2
        if of_shape:
            torch.cuda.empty_cache()  # what the graphs took

    def settled(self, weight_NK: torch.Tensor, num_rows: int) -> Choice:
        """The choice that was measured; the library where none was. Never measures."""
        if not 0 < num_rows <= MAX_ROWS:
            return TORCH
        bucket = 1 << (num_rows - 1).bit_length()
        return self.chosen.get((*weight_NK.shape, weight_NK.dtype, bucket), TORCH)


def milliseconds(
    weights: Sequence[torch.Tensor], num_rows: int, choice: Choice, scratch: Scratch | None = None
) -> float:
    """Time of one map with its norm, the best of a few runs over the weights; infinite where it can't be taken.

    Args:
        weights: on one CUDA device, of one shape ``[N, K]``.
    """
    first = weights[0]
    wanted = min(max(1, -(-COLD_BYTES // first.nbytes)), MOST_WEIGHTS, len(weights))
    some = list(weights[:wanted])
    some *= -(-FEWEST_MAPS // len(some))
    x_MK = torch.randn((num_rows, first.shape[1]), dtype=first.dtype, device=first.device)
    gain_K = torch.ones(first.shape[1], dtype=first.dtype, device=first.device)

    def chain() -> None:
        for weight_NK in some:
            linear(rms_norm(x_MK, gain_K, 1e-6), weight_NK, None, choice, scratch)

    stream = torch.cuda.Stream(first.device)
    stream.wait_stream(torch.cuda.current_stream(first.device))
    with torch.cuda.stream(stream):
        try:
            out = linear(rms_norm(x_MK, gain_K, 1e-6), first, None, choice, scratch)  # compiles
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        expected = linear(rms_norm(x_MK, gain_K, 1e-6), first, None, TORCH).float()
        error = float((out.float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= MOST_ERROR:
            logger.warning("%s is not taken: it errs by %.3g for %s", choice, error, tuple(first.shape))
            return float("inf")
        graph = captured(chain)
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        events[0].record(stream)
        for event in events[1:]:
            graph.replay()
            event.record(stream)
        stream.synchronize()
    spans = [events[i].elapsed_time(events[i + 1]) for i in range(REPEATS)]
    return min(spans) / len(some)
