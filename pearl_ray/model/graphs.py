"""CUDA graphs of passes, captured within a budget of seconds and bytes. Knows functions; knows no models or batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import astuple, dataclass

import torch

from pearl_ray.kernels.capture import captured

logger = logging.getLogger(__name__)

_GRAPH_BYTES = 32 << 20  # of one graph in the driver's memory and of the kernels loaded for it, at most


@dataclass(frozen=True, slots=True)
class GraphFigures:
    """What capturing has cost; ``num_skipped``: graphs that the budget had no room for, whose passes run without."""

    num_captured: int
    num_skipped: int
    seconds: float
    bytes: int

    @staticmethod
    def most(figures: Iterable[GraphFigures]) -> GraphFigures:
        """Of several ranks' (one at least): of each figure the largest."""
        return GraphFigures(*(max(column) for column in zip(*map(astuple, figures), strict=True)))


class GraphPool:
    """Runs functions whose tensors all have fixed addresses: by replay of a CUDA graph where there is one.

    All graphs share one memory pool, so what a pass computes on the way is valid until the next graph runs; results
    that must live longer belong in tensors made before. Without a GPU, or ``enabled=False``, functions are just called.

    Attributes:
        num_captured, seconds, bytes: what capturing has cost; without the compiling of kernels.
        figures: the same and what was left out.
        num_replayed, num_called: runs either way.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        enabled: bool,
        budget_s: float,
        budget_bytes: int,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """``agree``: makes one answer of all ranks' to whether the budget lasts: what is captured is collective."""
        self._device, self._agree = device, agree
        self._enabled = enabled and device.type == "cuda"
        self._budget_s, self._budget_bytes = budget_s, budget_bytes
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._skipped: set[Hashable] = set()
        self._pool: object = None
        self._stream: torch.cuda.Stream | None = None  # one for all: what the allocator keeps, it keeps per stream
        self.num_captured = self.num_replayed = self.num_called = self.bytes = 0
        self.seconds = 0.0

    def capture(self, key: Hashable, function: Callable[[], object]) -> bool:
        """Make a graph of ``function``, which is called twice on the way; False where the budget is spent."""
        if not self._enabled or key in self._graphs:
            return key in self._graphs
        if not self._agree(self.seconds < self._budget_s and self.bytes < self._budget_bytes):
            self._skipped.add(key)
            return False
        free = torch.cuda.mem_get_info(self._device)[0]
        reserved = torch.cuda.memory_reserved(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles kernels and makes scratch memory, which a capture may not
            function()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what the call above took would stay beside the graphs' own memory
        began = time.monotonic()  # now, as compiling is owed anyway, here or by the first round of this kind
        with torch.cuda.stream(stream):
            graph = captured(function, self._pool)
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph
        self.num_captured += 1
        self.seconds += time.monotonic() - began
        # The driver counts other processes on this device too, which may be making their caches.
        own = torch.cuda.memory_reserved(self._device) - reserved + _GRAPH_BYTES
        self.bytes += max(min(free - torch.cuda.mem_get_info(self._device)[0], own), 0)
        return True

    def has(self, key: Hashable) -> bool:
        """Whether :meth:`run` would replay a graph."""
        return key in self._graphs

    def run(self, key: Hashable, function: Callable[[], object]) -> None:
        """Queue the function's work on the current stream."""
        graph = self._graphs.get(key)
        if graph is None:
            self.num_called += 1
            function()
        else:
            self.num_replayed += 1
            graph.replay()

    @property
    def figures(self) -> GraphFigures:
        """What capturing has cost so far; all 0 without graphs."""
        return GraphFigures(self.num_captured, len(self._skipped), self.seconds, self.bytes)

    def log(self, what: str) -> None:
        """Say what capturing has cost."""
        f = self.figures
        text = "%s: %d CUDA graphs in %.1f s and %.2f GiB, %d left out by the budget"
        logger.info(text, what, f.num_captured, f.seconds, f.bytes / 2**30, f.num_skipped)
