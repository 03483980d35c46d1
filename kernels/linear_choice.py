"""Which of the ways to compute a linear map is fastest here, measured as a model launches it. Knows shapes, no layers.

A way is timed in a CUDA graph, after a norm and before the next one, over several weights of the same shape: so the
weights come from memory, and what a kernel gains by beginning early, or loses, counts. A map to gates and ups is timed
with SiLU·mul behind it, by itself or within, and is another map than a plain one of its shape. The fastest few are then
timed within some layers of the model. A way that doesn't compute what the library does, on a device or with a compiler
that nobody has tried, is not taken.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
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
FINALISTS = 4  # of each map, that are timed within a pass
ROUNDS_WITHIN = 7
MOST_ERROR = 0.02  # of a result, relative to the library's; two roundings to bfloat16 differ by 0.003


Key = tuple[int, int, torch.dtype, bool, int]  # of a map: outputs, inputs, type, is it to gates and ups; rows


@dataclass(slots=True)
class LinearChoices:
    """The fastest way for each map of a shape, and number of rows up to a power of two.

    Settle every shape before a forward is captured. Numerics differ between the ways by rounding, so ranks and
    replicas that must agree bit for bit share one object's answers (``chosen`` can be copied).

    Attributes:
        chosen: the way that is taken. finalists: the best by themselves, the fastest first.
    """

    chosen: dict[Key, Choice] = field(default_factory=dict)
    finalists: dict[Key, list[Choice]] = field(default_factory=dict)
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
                    times = {c: milliseconds(same, bucket, c, self.scratch, is_gate_up=is_gate_up) for c in ways}
                    right = sorted((c for c in ways if times[c] < math.inf), key=times.__getitem__)
                    # Where the library's own result isn't a number there is nothing to compare with.
                    self.finalists[key] = right[:FINALISTS] or [TORCH]
                    self.chosen[key] = self.finalists[key][0]
                bucket *= 2
        if of_shape:
            torch.cuda.empty_cache()  # what the graphs took

    def settle_within(
        self,
        part: Callable[[int], Callable[[], object]],
        weights: Iterable[torch.Tensor],
        gate_ups: Iterable[torch.Tensor] = (),
    ) -> None:
        """Chooses among each map's finalists by timing a part of the model's pass with each, one map after the other.

        Beside other kernels some ways are slower than by themselves, by more than the finalists differ: which ones, and
        by how much, changed from process to process (docs/performance.md).

        Args:
            part: of a number of rows makes the function that launches the part; no wait in it.
            weights, gate_ups: whose maps are in the part, all on one CUDA device.
        """
        keys = {_key(weight_NK, 1, is_up): weight_NK for some, is_up in ((weights, False), (gate_ups, True))
                for weight_NK in some}  # fmt: skip
        buckets = sorted({key[-1] for key in self.finalists})
        for bucket in buckets:
            mapped = [((*key[:-1], bucket), weight) for key, weight in keys.items()]
            open_ones = [(key, weight) for key, weight in mapped if len(self.finalists.get(key, ())) > 1]
            if not open_ones:
                continue
            run = part(bucket)
            for key, weight in sorted(open_ones, key=lambda item: -item[1].nbytes):
                timed = []
                for choice in self.finalists[key]:
                    self.chosen[key] = choice
                    timed.append(Timed(run, weight.device))
                rounds = [[one.seconds(1)[0] for one in timed] for _ in range(ROUNDS_WITHIN)]
                middle = [statistics.median(column) for column in zip(*rounds, strict=True)]
                self.chosen[key] = self.finalists[key][middle.index(min(middle))]
        for key in keys:
            for bucket in buckets:
                self.finalists.pop((*key[:-1], bucket), None)
        if buckets:
            torch.cuda.empty_cache()

    def settled(self, weight_NK: torch.Tensor, num_rows: int, *, is_gate_up: bool = False) -> Choice:
        """The choice that was measured; the library where none was. Never measures."""
        if not 0 < num_rows <= MAX_ROWS:
            return TORCH
        bucket = 1 << (num_rows - 1).bit_length()
        return self.chosen.get(_key(weight_NK, bucket, is_gate_up), TORCH)


def _key(weight_NK: torch.Tensor, bucket: int, is_gate_up: bool) -> Key:
    num_out, num_in = weight_NK.shape
    return num_out, num_in, weight_NK.dtype, is_gate_up, bucket


class Timed:
    """A CUDA graph of what a function launches, on a stream of its own, and how long it takes."""

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        """Calls the function twice; kernels are compiled the first time."""
        self._function = function  # whose tensors the graph reads
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            function()
            self._stream.synchronize()  # scratch memory and counters are for one stream at a time
            self._graph = captured(function)

    def seconds(self, runs: int) -> list[float]:
        """Of each of so many runs, queued one behind the other and behind another; waits."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        with torch.cuda.stream(self._stream):
            for event in events:
                self._graph.replay()
                event.record(self._stream)
        events[-1].synchronize()
        return [before.elapsed_time(event) / 1e3 for before, event in pairwise(events)]


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

    try:
        out, expected = one(first).float(), one(first, TORCH).float()
    except triton.runtime.errors.OutOfResources:
        return math.inf
    error = float((out - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= MOST_ERROR:
        logger.warning("%s is not taken: it errs by %.3g for %s", choice, error, tuple(first.shape))
        return math.inf
    return 1e3 * min(Timed(chain, first.device).seconds(REPEATS)) / len(some)
